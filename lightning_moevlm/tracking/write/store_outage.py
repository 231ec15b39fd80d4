"""Guards writes to a store that may stop answering: the writer says so once and continues.

Training must not fail because of its bookkeeping, nor a sweep because of one lost answer.
"""

from collections.abc import Callable

from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.tracking.store import describe_cause, limit_request_time


class OutageGuard:
    """Attempts on one store.

    Args:
        uri: the store's. It is named with its credentials masked.
        tell: is given one line when an outage begins.
        meanwhile: what happens during the outage, for that line.
    """

    def __init__(self, uri: str, tell: Callable[[str], None], meanwhile: str) -> None:
        self._shown_uri = mask_url_secrets(uri)
        self._tell = tell
        self._meanwhile = meanwhile
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why the last attempt failed; empty where it did not."""
        return self._reason

    def attempt(self, action: Callable[[], object]) -> bool:
        """Call an action, limit the time of its requests, and return whether the store took it."""
        from mlflow.exceptions import MlflowException

        before = self._reason
        try:
            with limit_request_time():
                action()
        except (MlflowException, OSError) as error:  # the exceptions of `requests` are OSErrors
            self._reason = describe_cause(error)
            if not before:
                self._tell(f"MLflow at {self._shown_uri} is unavailable; {self._meanwhile}: {self._reason}")
            return False
        self._reason = ""
        return True

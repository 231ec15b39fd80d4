"""A store that may stop answering: who writes to it learns that, tells it once, and goes on.

Training must not die of its bookkeeping, and a sweep must not die of one lost answer.
"""

from collections.abc import Callable

from lightning_moevlm.common.secret_masking import mask_url_secrets
from lightning_moevlm.tracking.store import describe_cause, limit_request_time


class OutageGuard:
    """Attempts on one store.

    uri: the store's, named with its credentials masked. tell: is handed one line when a silence begins. what: what
    the line says of the meantime.
    """

    def __init__(self, uri: str, tell: Callable[[str], None], what: str) -> None:
        self._shown_uri = mask_url_secrets(uri)
        self._tell = tell
        self._what = what
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why the last attempt failed; empty where it did not."""
        return self._reason

    def attempt(self, action: Callable[[], object]) -> bool:
        """Do something with the store and tell whether it answered; give up after seconds."""
        from mlflow.exceptions import MlflowException

        before = self._reason
        try:
            with limit_request_time():
                action()
        except (MlflowException, OSError) as error:  # the exceptions of `requests` are OSErrors
            self._reason = describe_cause(error)
            if not before:
                self._tell(f"MLflow at {self._shown_uri} takes nothing at the moment; {self._what}: {self._reason}")
            return False
        self._reason = ""
        return True

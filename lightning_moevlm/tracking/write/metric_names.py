"""Spells metric names as MLflow takes them: letters, digits, `_ - . /` and space, at most 250 characters.

MLflow refuses `recall@1`; Lightning's logger makes `recall1` of it, which is another name. Here it becomes
`recall_at_1`. Two names never become one.
"""

import hashlib
import re

LONGEST_NAME = 250  # characters; MLflow's limit for keys of metrics, params and tags
_FORBIDDEN = re.compile(r"[^\w/.\- ]")


def safe_name(name: str) -> str:
    """Return the nearest name that MLflow takes; a valid name is returned as it is."""
    spelled = _FORBIDDEN.sub("_", name.replace("@", "_at_"))
    # MLflow also refuses what a path would resolve to something else: `/a`, `a//b`, `a/../b`, `a/`.
    parts = [part for part in spelled.split("/") if part not in ("", ".", "..")]
    safe = "/".join(parts) or "_"
    return safe if len(safe) <= LONGEST_NAME else safe[: LONGEST_NAME - 9] + "_" + _digest(name)


class MetricNames:
    """Remembers the safe name of every name.

    A name whose safe spelling is taken by another one (`a@b` after `a_at_b`) gets a digest appended.
    """

    def __init__(self) -> None:
        self._safe: dict[str, str] = {}
        self._taken: set[str] = set()

    def safe(self, name: str) -> str:
        """Return the safe name of `name`, the same one each time."""
        known = self._safe.get(name)
        if known is None:
            known = safe_name(name)
            if known in self._taken:
                known = f"{known[: LONGEST_NAME - 9]}_{_digest(name)}"
            self._safe[name] = known
            self._taken.add(known)
        return known


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]

"""What the command line's parser complains about, said from the place of the mistake instead of from the root.

jsonargparse wraps a mistake in a line per level above it, with the rejected values of every level behind. Kept are the
whole key, what is wrong there, and what to look at; texts of other forms pass unchanged.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

_KEY = re.compile(r'Parser key "([^"]+)": ?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)': ")
_FACTORY = re.compile(r"Type \S.*? expects a function or a callable class: ")
_REJECTED = re.compile(r"\.? Got value: (?:Namespace|NestedArg)\(.*")
_REJECTED_CLASS = re.compile(r"Got value: Namespace\(class_path='([^']+)'")
_NO_CLASS = re.compile(r"(?:- )?(?:Expected a path but .*)?Expected a dot import path string: (\S+)")
_NO_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_UNKNOWN = re.compile(r"[Uu]nrecognized arguments: (--[\w.+-]+)")


def told_from_the_mistake(message: str, options: Iterable[str] = ()) -> str:
    """Return one line: where, what came, what to change.

    Args:
        message: the parser's, of any number of lines.
        options: what the parser accepts, `--trainer.max_steps` and the like, to name the nearest to an unknown one.
    """
    line = " ".join(message.split())
    unknown = _UNKNOWN.search(line)
    if unknown:
        near = get_close_matches(unknown[1], list(options), n=1)
        return f"{line}; {f'did you mean {near[0]}? ' if near else ''}--help lists the options"
    keys = _KEY.findall(line)
    if not keys:
        return line
    holders = _REJECTED_CLASS.findall(line) or _CLASS.findall(line)
    mistake = line[[match.end() for match in _KEY.finditer(line)][-1] :]
    mistake = _FACTORY.sub("", _CLASS.sub("", _REJECTED.sub("", mistake)))
    no_class, no_option = _NO_CLASS.search(mistake), _NO_OPTION.search(mistake)
    if no_class:
        mistake = f"there is no class {no_class[1]}; `moevlm list` shows what can be named, or give its class_path"
    elif no_option and holders:
        name = holders[0].rpartition(".")[2]
        mistake = f"{name} takes no {no_option[1]!r}; `moevlm describe {name}` lists its options"
    return f"{'.'.join(keys)}: {mistake}"

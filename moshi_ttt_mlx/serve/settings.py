"""A client's settings: what it may choose, checked before the model thread sees them."""

from ..errors import UserError

_NUMBERS = ("temp", "text_temp", "cfg_coef")
_WHOLE = ("top_k", "text_top_k", "seed", "context", "sinks")
NAMES = (*_NUMBERS, *_WHOLE, "memory", "conditions")

_LARGEST = 1 << 63


def parse_settings(given: object, defaults: dict) -> dict:
    """`Session`'s keyword arguments from a client's JSON object.

    Args:
        given: None or a dict by `NAMES`; None inside means the default.
        defaults: the server's.

    Raises:
        UserError: unknown names, wrong types, numbers that cannot be. What depends on the model (is
            the context too long?) is checked by `Session`.
    """
    if given is None:
        return dict(defaults)
    if not isinstance(given, dict):
        raise UserError("settings: expected an object")
    if unknown := sorted(map(repr, given.keys() - set(NAMES))):
        raise UserError(f"settings: unknown {unknown[0][:40]}; known are {', '.join(NAMES)}")
    chosen = {name: _checked(name, value) for name, value in given.items() if value is not None}
    return defaults | chosen


def _checked(name: str, value: object) -> object:
    if name in _NUMBERS:
        return float(_number(name, value, (int, float)))
    if name in _WHOLE:
        return _number(name, value, (int,))
    if name == "memory" and not isinstance(value, str):
        raise UserError("settings: memory: expected on, frozen or off")
    if name == "conditions" and not _strings(value):
        raise UserError("settings: conditions: expected an object of strings")
    return value


def _number(name: str, value: object, kinds: tuple) -> int | float:
    # To Python a bool is an int. NaN, which its JSON knows, is in no range.
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not 0 <= value < _LARGEST:
        kind = "a number" if float in kinds else "a whole number"
        raise UserError(f"settings: {name}: expected {kind} of 0 or more, got {str(value)[:40]}")
    return value


def _strings(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())

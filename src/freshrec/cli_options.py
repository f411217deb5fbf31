"""How options with several values are written: `a=b,c=d` and `a,b`."""

from freshrec.errors import OptionError


def pairs(text: str) -> dict[str, str]:
    """`a=b,c=d` as a dict. OptionError for what is not a pair."""
    found = {}
    for pair in words(text):
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise OptionError(f'"{pair[:60]}" is not a pair of column names; write --columns user_id=uid,item_id=sku.')
        found[ours.strip()] = theirs.strip()
    return found


def words(text: str) -> list[str]:
    """`a,b` as a list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def seconds(text: str) -> int:
    """`90s`, `10m` or `2h` in seconds. OptionError for anything else."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if unit is None or not number.isdecimal() or not int(number):
        raise OptionError(f'"{text[:60]}" is no time; write 90s, 10m or 2h.')
    return int(number) * unit

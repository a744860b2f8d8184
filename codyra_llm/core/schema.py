"""What settings files have in common: strict sections, types of numbers, and pydantic's errors as
sentences."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from codyra_llm.core.errors import Fault, nearest
from codyra_llm.core.parsing import decoded, parse_json, shown

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
MOST_TOKENS = 1 << 24  # more is a slip
Tokens = Annotated[int, Field(le=MOST_TOKENS)]


class Strict(BaseModel, frozen=True):
    """A section of a file of settings: unknown keys are errors, values are frozen. However it is made, from a
    file or in Python, it raises one Fault with everything that is wrong."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **given: Any):
        with in_sentences(type(self)):
            super().__init__(**given)

    # Without this mark pydantic would call __init__ for sections inside a section too, one at a time, and the
    # first Fault would hide the others.
    __init__.__pydantic_base_init__ = True  # pyright: ignore

    @classmethod
    def model_validate(cls, obj: Any, *, prefix: tuple[str, ...] = (), **options: Any) -> Self:
        """The section that a mapping holds. `prefix`: where the mapping is in its file, for messages."""
        with in_sentences(cls, prefix):
            return super().model_validate(obj, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """The section that a JSON text holds."""
        text = json_data if isinstance(json_data, str) else decoded(bytes(json_data), "the text")
        return cls.model_validate(parse_json(text, "the text", "a mapping"), **options)

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError:
            raise Fault(
                f"{name}: {shown(value)} can't be assigned, since settings are checked together and then "
                f"fixed; make a changed copy, e.g. load_recipe(recipe, ['seed=2'])"
            ) from None

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_is_an_empty_section(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a section whose keys are all commented out as null."""
        assert info.field_name  # this is called for fields alone
        kind = cls.model_fields[info.field_name].annotation
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        return {} if value is None and is_section else value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name  # this is called for fields alone
        kinds = list(_kinds(cls.model_fields[info.field_name].annotation))
        if (int in kinds or float in kinds) and bool not in kinds:
            for one in _elements(value):
                if isinstance(one, bool):
                    raise ValueError(f"{str(one).lower()} is not a number; give one")
        return value


def _elements(value: Any) -> Iterable[Any]:
    """The items of a mapping or a list; anything else as a single item."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else [value]


@contextmanager
def in_sentences(schema: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[None]:
    """Within this block what pydantic finds wrong with `schema` is raised as one Fault."""
    try:
        yield
    except ValidationError as error:
        raise Fault(*sentences(error, schema, prefix)) from None


def sentences(error: ValidationError, schema: type[BaseModel], prefix: tuple = ()) -> list[str]:
    """What pydantic found wrong with `schema`, in sentences. `prefix`: where the mapping is in its file."""
    return [sentence for e in _by_key(error, schema) for sentence in _sentences(e, schema, prefix)]


def _sentences(e: dict[str, Any], schema: type[BaseModel], prefix: tuple) -> list[str]:
    """One of pydantic's errors as sentences: more than one where a validator has found several faults."""
    loc, kind, given = e["loc"], e["type"], shown(e["input"])
    key = ".".join(str(part) for part in (*prefix, *loc))
    if kind == "extra_forbidden":
        known = _fields(schema, loc[:-1])
        close = nearest(str(loc[-1]), known)
        return [f"unknown key '{key}' (value {given}).{close} Known here: {', '.join(known)}"]
    if kind == "missing" and isinstance(loc[-1], int):
        whole = ".".join(str(part) for part in (*prefix, *loc[:-1]))
        return [f"{whole}: {given} has too few items; write all of them"]
    if kind == "missing":
        return [f"'{key}' is missing; add it"]
    if kind in ("model_type", "dict_type") and not key:
        return [f"{given} is not a mapping; give one, with the keys {', '.join(schema.model_fields)}"]
    if kind in ("model_type", "dict_type"):
        return [f"{key}: {given} is not a section; write its keys below '{key}', each with its value"]
    if kind == "value_error":
        message = str(e.get("ctx", {})["error"])
        return [f"{key}: {line}" if key else line for line in message.splitlines()]
    expected = e["msg"][0].lower() + e["msg"][1:].replace("a valid tuple", "a valid list")
    allowed = str(e.get("ctx", {}).get("expected", "")).split("'")  # 'a', 'b' or 'c'
    close = nearest(given.strip("'"), allowed)
    return [f"{key}: {given} is not valid; {expected}{close}{_in_brackets(e['input'], expected)}"]


def _in_brackets(given: Any, expected: str) -> str:
    """How a list is written, where one could have been given and a single text or number was."""
    is_one = isinstance(given, str | int | float) and not isinstance(given, bool)
    return "; a list is written in brackets, [A, B]" if is_one and "valid list" in expected else ""


def _by_key(error: ValidationError, schema: type[BaseModel]) -> list[dict[str, Any]]:
    """The errors, each at the key that it is about.

    For a value that may be of several kinds (a union) pydantic has an error for each kind, with the kind's
    name among the parts of the location. Here the name is left out. What is wrong within the value is kept,
    where it fits one kind well enough to be looked into or compared with a bound; otherwise one error names
    all kinds."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for e in error.errors():
        loc, cut = e["loc"], _place_of_kind(schema, e["loc"])
        at = loc if cut is None else loc[:cut]
        within = () if cut is None else loc[cut + 1 :]
        found.setdefault(at, []).append({**e, "loc": at, "within": within})
    out = []
    for at, errors in found.items():
        inner = [e for e in errors if e["within"]]
        of_a_kind = [e for e in errors if e["type"].startswith(("greater_than", "less_than"))]
        if inner:
            out += [{**e, "loc": (*at, *e["within"])} for e in inner]
        elif of_a_kind:
            out += of_a_kind
        elif len(errors) > 1:
            messages = dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in errors)
            out.append({**errors[0], "type": "kind", "msg": f"Input should be {', or '.join(messages)}"})
        else:
            out += errors
    return out


def _place_of_kind(schema: type[BaseModel], loc: tuple) -> int | None:
    """The position in `loc` of a kind's name, for a value that may be of several; None without one."""
    inside: Any = schema
    for place, part in enumerate(loc):
        if not (isinstance(inside, type) and issubclass(inside, BaseModel) and part in inside.model_fields):
            return None
        kind = inside.model_fields[part].annotation
        choices = [one for one in get_args(kind) if one is not NoneType]
        if get_origin(kind) in (Union, UnionType) and len(choices) > 1:
            return place + 1 if place + 1 < len(loc) else None
        inside = next(_sections(kind), None)
    return None


def _fields(schema: type[BaseModel], loc: tuple) -> list[str]:
    """Names of the keys at `loc`; parts of it that are not fields are keys of a mapping, and are skipped."""
    for part in loc:
        if part in schema.model_fields:
            schema = next(_sections(schema.model_fields[part].annotation), schema)
    return list(schema.model_fields)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The annotation and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)

"""What a user asks for, as data: which norms are to become what, and stand where."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, Unpack

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from normswap.errors import RefusedError

#: where means may be subtracted at run time
Explicit = Literal["never", "shared", "always"]
#: how the orthogonal matrix is made that streams are rotated by
Rotating = Literal["hadamard", "random", "pca"]


def parse_layers(text: str) -> set[int]:
    """Layer numbers from `0-3,7`. Raises RefusedError where that is not what it is."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise RefusedError(f"--layers expects numbers and ranges such as 0-3,7; found '{text}'.")
        found |= set(range(int(first), int(last or first) + 1))
    return found


class Placement(BaseModel):
    """A placement, and the layers that get it: `0-3,7`, or None for all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layers: str | None = None

    @property
    def budget(self) -> float | None:
        """Of `auto:KL`, the KL in nats per token that the move may cost. Raises RefusedError for anything else."""
        if self.layers is None or not self.layers.startswith("auto"):
            return None
        try:
            budget = float(self.layers.removeprefix("auto:"))
        except ValueError:
            budget = 0.0
        if not budget > 0:
            raise RefusedError(f"--layers {self.layers}: expected auto:KL, with a number of nats such as auto:0.01.")
        return budget

    def everywhere(self) -> Placement:
        """The same for all layers, where they are yet to be chosen."""
        return self if self.budget is None else self.model_copy(update={"layers": None})

    def check_layers(self) -> None:
        """Raises RefusedError where `layers` is neither numbers nor a budget."""
        self.everywhere().takes(None)

    def takes(self, layer: int | None) -> bool:
        """Whether a layer is among those that get it. Raises RefusedError where `layers` is no list of numbers."""
        return self.layers is None or layer in parse_layers(self.layers)

    def words(self) -> str:
        return f"--placement {self.name}" + (f" --layers {self.layers}" if self.layers else "")


class NormChoice(BaseModel):
    """A kind of norm, and the sites that get it.

    Attributes:
        kind: of `norms.kinds.OFFERED`.
        sites: a pattern of paths as in a shell, `*.ln_1`, several with commas between; None: all.
        role: of `understand.normmap.ROLES`; None: any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    sites: str | None = None
    role: str | None = None

    @property
    def everywhere(self) -> bool:
        return self.sites is None and self.role is None

    def takes(self, path: str, role: str) -> bool:
        """Whether the site at `path` is among those that get it."""
        patterns = (self.sites or "*").split(",")
        return self.role in (None, role) and any(fnmatchcase(path, pattern.strip()) for pattern in patterns)

    def words(self) -> str:
        where = [f"--sites '{self.sites}'" if self.sites else "", f"--role {self.role}" if self.role else ""]
        return " ".join(filter(None, [f"--norm {self.kind}", *where]))


class Words(TypedDict, total=False):
    """The options of a conversion, by the names that they have on the command line.

    Attributes:
        norm: the kind of norm to convert to, `rmsnorm`, `dyt`, ...; several for several sets of sites.
        sites, role: which sites get it, by a pattern of paths and by what they do; by position, one for each `norm`.
            `*` and `any` take all, as does what is left out.
        fold: move gains and biases into the linear maps that read them.
        placement: where norms are to stand, `post`, `deepnorm`, ... (`planning.rewrites.steps.ROWS`); None leaves them.
        layers: which layers get it, `0-3,7`; None: all. Several placements have their layers by position.
        qk_norm: put a norm of this kind, `rmsnorm` or `layernorm`, on the heads of queries and keys, behind a gate that
            starts as the identity.
        exact: only forms that compute the same function, with a gate or a carried scale where that takes one.
        tied: `keep` tied embeddings, centring the embedding's output where its weights cannot be; `untie` stores both.
        partial: convert the sites that can be converted and leave the rest.
        explicit: whether means that no weights control may be subtracted at run time: `never`; `shared`, where one
            subtraction serves several norms; `always`, if need be in front of each norm.
        rotate: carry every stream that RMSNorms alone normalise in another basis: `hadamard`, `random`, or `pca`, the
            principal axes of the stream on data.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # in recipes

    norm: str | Sequence[str] | None
    sites: str | Sequence[str] | None
    role: str | Sequence[str] | None
    fold: bool
    placement: str | Sequence[str] | None
    layers: str | Sequence[str] | None
    qk_norm: str | None
    exact: bool
    tied: Literal["keep", "untie"]
    partial: bool
    explicit: Explicit
    rotate: Rotating | None


class Request(BaseModel):
    """What was asked for, in the words of the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    norms: tuple[NormChoice, ...] = ()
    fold: bool = False
    placements: tuple[Placement, ...] = ()
    qk_norm: str | None = None
    exact: bool = False
    tied: Literal["keep", "untie"] = "keep"
    partial: bool = False
    explicit: Explicit = "shared"
    rotate: Rotating | None = None

    @classmethod
    def of(cls, **words: Unpack[Words]) -> Request:
        """A request in the words of the command line. Raises RefusedError for layers without a placement, say."""
        words = dict(words)
        given = {name: _listed(words.pop(name, None)) for name in ("norm", "sites", "role", "placement", "layers")}
        kinds, places = given["norm"], given["placement"]
        sites = _by_position(given["sites"], kinds, "sites", "norm", "*")
        roles = _by_position(given["role"], kinds, "role", "norm", "any")
        layers = _by_position(given["layers"], places, "layers", "placement")
        norms = (NormChoice(kind=k, sites=s, role=r) for k, s, r in zip(kinds, sites, roles, strict=True))
        placements = (Placement(name=name, layers=which) for name, which in zip(places, layers, strict=True))
        try:
            return cls(norms=tuple(norms), placements=tuple(placements), **words)
        except ValidationError as error:
            found = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors()
            )
            raise RefusedError(f"what was asked for is not understood: {found}.") from error

    @classmethod
    def merged(cls, requests: Sequence[Request]) -> Request:
        """Several requests as one. Raises RefusedError where two of them want different things of one option."""
        found: dict[str, object] = {}
        for request in requests:
            for name in request.model_fields_set:
                value, other = getattr(request, name), found.get(name)
                if name in ("norms", "placements"):
                    value = (*(other or ()), *value)
                elif value == cls.model_fields[name].default:
                    continue
                elif other not in (None, value):
                    raise RefusedError(f"two conversions want different things: {name} is {other!r}, and {value!r}.")
                found[name] = value
        return cls(**found)

    @property
    def chooses_layers(self) -> bool:
        """Whether layers are to be chosen by what moving them costs."""
        return any(placement.budget is not None for placement in self.placements)

    def everywhere(self) -> Request:
        """The same for all layers, where they are yet to be chosen."""
        return self.model_copy(update={"placements": tuple(p.everywhere() for p in self.placements)})

    def words(self) -> str:
        """The request as options of the command line."""
        norms = self.norms
        if len(norms) > 1:  # by position, each says where
            norms = [c.model_copy(update={"sites": c.sites or "*", "role": c.role or "any"}) for c in norms]
        options = [*(choice.words() for choice in norms), "--fold" if self.fold else ""]
        options.append(f"--qk-norm {self.qk_norm}" if self.qk_norm else "")
        options += [*(placement.words() for placement in self.placements), "--exact" if self.exact else ""]
        options += ["--tied untie" if self.tied == "untie" else "", "--partial" if self.partial else ""]
        options.append("" if self.explicit == "shared" else f"--explicit {self.explicit}")
        options.append(f"--rotate {self.rotate}" if self.rotate else "")
        return " ".join(filter(None, options))


def _listed(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else [*(given or ())]


def _by_position(
    given: list[str], owners: list[str], name: str, owner: str, everything: str | None = None
) -> list[str | None]:
    """One of `given` for each of `owners`, None for those that take everything."""
    if len(given) > len(owners):
        raise RefusedError(
            f"{name} {given[len(owners)]} belong{'s' if name == 'role' else ''} to no {owner}: "
            f"give one --{owner} for each --{name}."
        )
    given = [None if value == everything else value for value in given]
    return given + [None] * (len(owners) - len(given))

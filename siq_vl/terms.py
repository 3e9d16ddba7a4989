"""Licences and terms of what a model is made from, by the one table of `terms.yaml`: for plans, and for model cards."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

TABLE = Path(__file__).parent / "terms.yaml"
OWN = "apache-2.0"  # of this project, its drawn data and its tiny backbones
_PERMISSIVE = (OWN, "mit", "bsd-3-clause", "cc-by-4.0")


@dataclass(frozen=True)
class Terms:
    """What is known of an id.

    Attributes:
        name: the id, with its subset where it has one.
        licence: its identifier on the Hub; None where none was found.
        access: `"open"`, `"click"` or `"gated"`.
        forbids: see `terms.yaml`.
        terms: a sentence, possibly empty.
        rows: by split.
        gb: to download.
        verified: how this was found.
        known: whether the table has it.
    """

    name: str
    licence: str | None = None
    access: str = "open"
    forbids: tuple[str, ...] = ()
    terms: str = ""
    rows: Mapping[str, int] | None = None
    gb: float | None = None
    verified: str = ""
    known: bool = True

    @property
    def permissive(self) -> bool:
        """Whether nothing has to be minded."""
        return self.licence in _PERMISSIVE and not self.forbids and self.access == "open"


@cache
def _table() -> dict[str, dict]:
    told = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {**told["models"], **told["data sets"]}


def known_ids() -> list[str]:
    """Return the ids of the table, each subset as `owner/name/subset`."""
    names = []
    for id, entry in _table().items():
        names.append(id)
        names += [f"{id}/{subset}" for subset in entry.get("subsets", {})]
    return names


def ids_table() -> str:
    """Return the table as Markdown: what each id holds, under which terms, and how that was found."""
    lines = ["| id | rows | GB | licence | access | to mind | verified by |", "|---|---|---:|---|---|---|---|"]
    for name in known_ids():
        found = terms_of(name)
        rows = ", ".join(f"{split} {count:,}" for split, count in (found.rows or {}).items()) or "-"
        size = "-" if found.gb is None else f"{found.gb:g}"
        mind = "; ".join(_to_mind(found)) or "-"
        lines.append(f"| {name} | {rows} | {size} | {_licence(found)} | {found.access} | {mind} | {found.verified} |")
    return "\n".join(lines)


def terms_of(name: str) -> Terms:
    """Return what is known of an id; `owner/name/subset` is a subset of a data set."""
    owner, _, rest = name.partition("/")
    repo, _, subset = rest.partition("/")
    entry = _table().get(f"{owner}/{repo}")
    if entry is None:
        return Terms(name, known=False)
    if subset and "subsets" in entry:
        if subset not in entry["subsets"]:
            return Terms(name, known=False)
        entry = {**entry, "terms": "", **entry["subsets"][subset]}
    return Terms(
        name,
        entry["licence"],
        entry.get("access", "open"),
        tuple(entry.get("forbids", ())),
        entry.get("terms", ""),
        entry.get("rows"),
        entry.get("gb"),
        entry["verified"],
    )


def is_hub_id(name: str | None) -> bool:
    """Return whether a name is an id of the Hub, or a subset of one, rather than a folder or file of this machine."""
    if not name or not 1 <= name.count("/") <= 2 or name.startswith((".", "/", "~")):
        return False
    root = Path(__file__).resolve().parents[1]
    return not any((base / name).exists() for base in (Path(), root))


def made_from(settings: Mapping) -> list[str]:
    """Return the ids that a checkpoint was made from, by its `training_settings.json`: weights, data, teachers.

    What the checkpoint before it was made from is among them.
    """
    sources = (settings.get("data") or {}).get("sources") or []
    names = [*(settings.get("backbones") or {}).values(), *(settings.get("made_from") or [])]
    if settings.get("traces"):
        counted = (settings.get("data_counts") or {}).get("sources") or []
        names += [given.partition("=")[0] for given in settings["traces"].get("teachers") or []]
        names += [each["name"] for each in counted]  # of a store of which every teacher is used
    else:
        names += [source_name(source) for source in sources if isinstance(source, Mapping)]
    return sorted({name for name in names if is_hub_id(name)})


def data_sets_of(names: Iterable[str]) -> list[str]:
    """Return the ids of those that are data sets of the table, without their subsets."""
    known = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["data sets"]
    return sorted({id for id in known for name in names if name == id or name.startswith(f"{id}/")})


def source_name(source: Mapping) -> str:
    """Return the id of a source of a recipe, with its subset."""
    return "/".join(filter(None, (source.get("path"), source.get("subset"))))


def inherited(checkpoint: Path) -> list[str]:
    """Return what a checkpoint of this machine was made from; nothing where that was not noted."""
    path = checkpoint / "training_settings.json"
    if not path.is_file():
        return []
    return made_from(json.loads(path.read_text(encoding="utf-8")))


def licence_for(names: Iterable[str]) -> str:
    """Return the licence of a model made from these: the narrowest of theirs, `other` where that is none of the usual.

    The order: unknown terms, or outputs that may not be trained on: `other`; no commercial use; sharing alike; this
    project's own.
    """
    found = [terms_of(name) for name in names]
    forbids = {what for each in found for what in each.forbids}
    licences = {each.licence for each in found}
    if None in licences or "other" in licences or "training on outputs" in forbids:
        return "other"
    if "commercial use" in forbids:
        alike = any("nc-sa" in (each.licence or "") for each in found)
        return "cc-by-nc-sa-4.0" if alike else "cc-by-nc-4.0"
    if "closed sharing" in forbids:
        return "gpl-3.0" if "gpl-3.0" in licences else "cc-by-sa-4.0"
    return OWN if licences <= set(_PERMISSIVE) else "other"


def terms_table(names: Sequence[str]) -> str:
    """Return a Markdown table of what has a licence to mind, by id; empty where nothing was taken from elsewhere."""
    if not names:
        return ""
    lines = ["| made from | licence | to mind |", "|---|---|---|"]
    for name in names:
        found = terms_of(name)
        lines.append(f"| {name} | {_licence(found)} | {'; '.join(_to_mind(found)) or '-'} |")
    return "\n".join(lines)


def warnings_of(names: Iterable[str]) -> list[str]:
    """Return a line for each id whose terms have to be minded before anything is spent on it."""
    lines = []
    for name in names:
        found = terms_of(name)
        if not found.permissive:
            lines.append(f"{name}: licence {_licence(found)}; {'; '.join(_to_mind(found)) or 'read it first'}")
    return lines


def _licence(found: Terms) -> str:
    return found.licence or ("not known here" if not found.known else "none was found")


def _to_mind(found: Terms) -> list[str]:
    """Return what a user of an id has to mind."""
    said = [f"no {what}" for what in found.forbids]
    if found.access != "open":
        said.append(
            {"click": "accept its terms on its page first", "gated": "access has to be granted first"}[found.access]
        )
    if not found.known:
        said.append("look its terms up, and note them in siq_vl/terms.yaml")
    if found.terms:
        said.append(found.terms)
    return said

"""The names that files use for what the code holds. A class may move and a field may be renamed; its files still open.

Every class that a checkpoint can hold has a *tag*, which never changes and is what files name it by. To move or rename
a class, change its place in `CLASSES`. To rename a field, add a line to `FIELDS`; the other tables are for values,
weights and the keys and columns of other files. `FORMER` is history: version 0.1.0 wrote these names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from freshrec.config import IMPORTS
from freshrec.errors import StateError

# tag -> where the class is now. A tag is never changed and never given to another class.
CLASSES = {
    # what a state is made of
    "state": "freshrec.types:State",
    "histories": "freshrec.types:Histories",
    "events": "freshrec.types:Events",
    "impressions": "freshrec.types:Shown",
    "interests": "freshrec.types:Interests",
    "batch-interests": "freshrec.data.carried:Carried",
    "targets": "freshrec.data.batches:Targets",
    "exemplars": "freshrec.learn.reservoir:Kept",
    "reservoir": "freshrec.learn.reservoir:Reservoir",
    "queries": "freshrec.replay.measure:Queries",
    "log-options": "freshrec.serve.reading:Reading",
    # the options of models
    "blend-spec": "freshrec.models.blend:BlendSpec",
    "biased-mf-spec": "freshrec.models.mf_biased:BiasedMFSpec",
    "caser-spec": "freshrec.models.caser:CaserSpec",
    "embedding-mlp-spec": "freshrec.models.embedding_mlp:EmbeddingMLPSpec",
    "gru4rec-spec": "freshrec.models.gru4rec:GRU4RecSpec",
    "item-pairs-spec": "freshrec.models.pairs:PairsSpec",
    "limarec-spec": "freshrec.models.limarec:LimaRecSpec",
    "mf-spec": "freshrec.models.mf:MFSpec",
    "mimn-spec": "freshrec.models.mimn:MIMNSpec",
    "multi-interest-spec": "freshrec.models.interests:InterestSpec",
    "multi-interest-published-spec": "freshrec.models.originals:OriginalSpec",
    "pooled-spec": "freshrec.models.pooled:PooledSpec",
    "popularity-spec": "freshrec.models.popularity:PopularitySpec",
    "repeat-spec": "freshrec.models.repeat:RepeatSpec",
    "sasrec-spec": "freshrec.models.sasrec:SASRecSpec",
    "session-knn-spec": "freshrec.models.sknn:SKNNSpec",
    "stamp-spec": "freshrec.models.stamp:STAMPSpec",
    "user-knn-spec": "freshrec.models.user_knn:UserKNNSpec",
    # strategies, their parts, and what they keep
    "absorb-strategy": "freshrec.strategies.plain:Absorb",
    "frozen-strategy": "freshrec.strategies.plain:Frozen",
    "finetune-strategy": "freshrec.strategies.plain:FineTune",
    "retrain-strategy": "freshrec.strategies.plain:Retrain",
    "refit-strategy": "freshrec.strategies.refit:Refit",
    "fit-config": "freshrec.learn.fit:Fit",
    "ader-strategy": "freshrec.strategies.ader:ADER",
    "ader-s-strategy": "freshrec.strategies.ader_s:ADERS",
    "asmg-strategy": "freshrec.strategies.asmg:ASMG",
    "asmg-memory": "freshrec.strategies.asmg:Memory",
    "asmg-span": "freshrec.strategies.asmg:Block",
    "weight-generator": "freshrec.learn.generators:Generator",
    "gru-generator": "freshrec.learn.generators:GRU",
    "linear-generator": "freshrec.learn.generators:Mix",
    "model-window": "freshrec.learn.generators:Window",
    "ewc-strategy": "freshrec.strategies.ewc:EWC",
    "imsr-strategy": "freshrec.strategies.imsr:IMSR",
    "interest-retainer": "freshrec.strategies.imsr:Retain",
    "interest-detector": "freshrec.strategies.imsr:Detect",
    "interest-trimmer": "freshrec.strategies.imsr:Trimmer",
    "interest-budget": "freshrec.learn.upkeep:Upkeep",
    "incctr-strategy": "freshrec.strategies.incctr:IncCTR",
    "distillation": "freshrec.strategies.incctr:Distill",
    "self-tuned-strategy": "freshrec.strategies.rehearsed:Rehearsed",
    "self-tuned-memory": "freshrec.strategies.rehearsed:Memory",
    "training-regime": "freshrec.strategies.rehearsed:Manner",
    "sml-strategy": "freshrec.strategies.sml:SML",
    "sml-memory": "freshrec.strategies.sml:Memory",
    "sml-span": "freshrec.strategies.sml:Block",
    "cnn-transfer": "freshrec.learn.transfer:CNNTransfer",
    "linear-transfer": "freshrec.learn.transfer:LinearTransfer",
    "mlp-transfer": "freshrec.learn.transfer:MLPTransfer",
    "spmf-strategy": "freshrec.strategies.spmf:SPMF",
    # what a replay is made of
    "replay-cell": "freshrec.replay.replay:Cell",
    "replay-settings": "freshrec.replay.replay:Settings",
    "query-selection": "freshrec.replay.measure:Asked",
}

# tag -> {former name of a field: its name now; None: it is no longer kept}
FIELDS: dict[str, dict[str, str | None]] = {}

# tag -> {field, by its name now: {a former value: the value now}}, of options that are words
VALUES: dict[str, dict[str, dict[str, str]]] = {}

# tag -> {field that older files lack and that has no default in its class: its value, as JSON holds it}
ADDED: dict[str, dict[str, str | float | bool | None]] = {}

# tag of what holds them, a model's by its options, or "" for all -> {former part of a weight's name: the part now}
WEIGHTS: dict[str, dict[str, str]] = {}

# former names -> names now, of the keys and columns of the other files
MANIFEST_KEYS: dict[str, str] = {}  # of a version's manifest.json
NUMBER_KEYS: dict[str, str] = {}  # of "numbers" in it
DAY_KEYS: dict[str, str] = {}  # of the facts of a day in it
MOVE_KEYS: dict[str, str] = {}  # of live.json
KINDS: dict[str, str] = {}  # values of "kind" in manifest.json, and of "action" in live.json
RECIPE_KEYS: dict[str, dict[str, str]] = {}  # of recipe.toml, by its table
RANK_COLUMNS: dict[str, str] = {}  # of span-*.parquet in a replay
COST_KEYS: dict[str, str] = {}  # of costs-*.json in a replay
TABLE_COLUMNS: dict[str, str] = {}  # of users.parquet, items.parquet and categories.parquet

# What 0.1.0 wrote -> the tag. These are names of the past: whoever renames code leaves them alone.
FORMER = {
    "freshrec.data.batches:Targets": "targets",
    "freshrec.data.carried:Carried": "batch-interests",
    "freshrec.learn.fit:Fit": "fit-config",
    "freshrec.learn.generators:GRU": "gru-generator",
    "freshrec.learn.generators:Generator": "weight-generator",
    "freshrec.learn.generators:Mix": "linear-generator",
    "freshrec.learn.generators:Window": "model-window",
    "freshrec.learn.reservoir:Kept": "exemplars",
    "freshrec.learn.reservoir:Reservoir": "reservoir",
    "freshrec.learn.transfer:CNNTransfer": "cnn-transfer",
    "freshrec.learn.transfer:LinearTransfer": "linear-transfer",
    "freshrec.learn.transfer:MLPTransfer": "mlp-transfer",
    "freshrec.learn.upkeep:Upkeep": "interest-budget",
    "freshrec.models.blend:BlendSpec": "blend-spec",
    "freshrec.models.caser:CaserSpec": "caser-spec",
    "freshrec.models.embedding_mlp:EmbeddingMLPSpec": "embedding-mlp-spec",
    "freshrec.models.gru4rec:GRU4RecSpec": "gru4rec-spec",
    "freshrec.models.interests:InterestSpec": "multi-interest-spec",
    "freshrec.models.limarec:LimaRecSpec": "limarec-spec",
    "freshrec.models.mf:MFSpec": "mf-spec",
    "freshrec.models.mf_biased:BiasedMFSpec": "biased-mf-spec",
    "freshrec.models.mimn:MIMNSpec": "mimn-spec",
    "freshrec.models.originals:OriginalSpec": "multi-interest-published-spec",
    "freshrec.models.pairs:PairsSpec": "item-pairs-spec",
    "freshrec.models.pooled:PooledSpec": "pooled-spec",
    "freshrec.models.popularity:PopularitySpec": "popularity-spec",
    "freshrec.models.repeat:RepeatSpec": "repeat-spec",
    "freshrec.models.sasrec:SASRecSpec": "sasrec-spec",
    "freshrec.models.sknn:SKNNSpec": "session-knn-spec",
    "freshrec.models.stamp:STAMPSpec": "stamp-spec",
    "freshrec.models.user_knn:UserKNNSpec": "user-knn-spec",
    "freshrec.replay.measure:Asked": "query-selection",
    "freshrec.replay.measure:Queries": "queries",
    "freshrec.replay.replay:Cell": "replay-cell",
    "freshrec.replay.replay:Settings": "replay-settings",
    "freshrec.serve.reading:Reading": "log-options",
    "freshrec.strategies.ader:ADER": "ader-strategy",
    "freshrec.strategies.ader_s:ADERS": "ader-s-strategy",
    "freshrec.strategies.asmg:ASMG": "asmg-strategy",
    "freshrec.strategies.asmg:Block": "asmg-span",
    "freshrec.strategies.asmg:Memory": "asmg-memory",
    "freshrec.strategies.ewc:EWC": "ewc-strategy",
    "freshrec.strategies.imsr:Detect": "interest-detector",
    "freshrec.strategies.imsr:IMSR": "imsr-strategy",
    "freshrec.strategies.imsr:Retain": "interest-retainer",
    "freshrec.strategies.imsr:Trimmer": "interest-trimmer",
    "freshrec.strategies.incctr:Distill": "distillation",
    "freshrec.strategies.incctr:IncCTR": "incctr-strategy",
    "freshrec.strategies.plain:Absorb": "absorb-strategy",
    "freshrec.strategies.plain:FineTune": "finetune-strategy",
    "freshrec.strategies.plain:Frozen": "frozen-strategy",
    "freshrec.strategies.plain:Retrain": "retrain-strategy",
    "freshrec.strategies.refit:Refit": "refit-strategy",
    "freshrec.strategies.rehearsed:Manner": "training-regime",
    "freshrec.strategies.rehearsed:Memory": "self-tuned-memory",
    "freshrec.strategies.rehearsed:Rehearsed": "self-tuned-strategy",
    "freshrec.strategies.sml:Block": "sml-span",
    "freshrec.strategies.sml:Memory": "sml-memory",
    "freshrec.strategies.sml:SML": "sml-strategy",
    "freshrec.strategies.spmf:SPMF": "spmf-strategy",
    "freshrec.types:Events": "events",
    "freshrec.types:Histories": "histories",
    "freshrec.types:Interests": "interests",
    "freshrec.types:Shown": "impressions",
    "freshrec.types:State": "state",
}


def tag_of(kind: type) -> str:
    """The name of a class in files: its tag, or module:qualname where it belongs to somebody else's package.

    StateError for a class of this package that has no tag.
    """
    place = f"{kind.__module__}:{kind.__qualname__}"
    tags = {where: tag for tag, where in CLASSES.items()}
    if place in tags:
        return tags[place]
    if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
        raise StateError(f"{place} cannot be saved, it has no tag; give it one in CLASSES of freshrec/disk_names.py.")
    return place


def class_of(name: str) -> type:
    """The dataclass with a tag, or somebody else's by module:qualname, whose module must be imported already.

    Somebody else's strategy may also be a class with nothing but its method.

    Nothing else is ever imported or called because of what a file says. StateError where there is no such dataclass.
    """
    module, _, qualname = CLASSES.get(name, name).partition(":")
    if name in CLASSES:
        importlib.import_module(module)
    if not qualname:
        raise StateError(f'the state needs the class "{name[:60]}", which this freshrec lacks; upgrade freshrec.')
    if module not in sys.modules:
        raise StateError(
            f"the state needs {module}, which is not imported; import it before loading, or set {IMPORTS}={module} "
            "for the command line."
        )
    from freshrec.types import Strategy  # it imports torch, which whoever loads a state has

    found = vars(sys.modules[module]).get(qualname)
    if not (isinstance(found, type) and (is_dataclass(found) or issubclass(found, Strategy))):
        raise StateError(
            f"the state needs the dataclass {module}:{qualname}, which this freshrec lacks; upgrade freshrec."
        )
    return found


def with_current_keys(content: Any, keys: Mapping[str, str]) -> Any:
    """What JSON holds, with the names of now for its keys where it is a dict."""
    return {keys.get(key, key): value for key, value in content.items()} if isinstance(content, dict) else content


def current_manifest(content: Any) -> Any:
    """What a manifest.json of any version holds, with the names of now."""
    found = with_current_keys(content, MANIFEST_KEYS)
    if not isinstance(found, dict):
        return found
    if isinstance(data := found.get("data"), dict) and "day" in data:
        found["data"] = data | {"day": with_current_keys(data["day"], DAY_KEYS)}
    if "numbers" in found:
        found["numbers"] = with_current_keys(found["numbers"], NUMBER_KEYS)
    return _current_word(found, "kind", KINDS)


def current_move(content: Any) -> Any:
    """What a live.json of any version holds of one move, with the names of now."""
    found = with_current_keys(content, MOVE_KEYS)
    return _current_word(found, "action", KINDS) if isinstance(found, dict) else found


def _current_word(content: dict[str, Any], key: str, words: Mapping[str, str]) -> dict[str, Any]:
    word = content.get(key)
    return content | {key: words[word]} if isinstance(word, str) and word in words else content


def with_current_names(node: dict[str, Any], weights: Mapping[str, str] | None = None) -> dict[str, Any]:
    """An encoded tree of a checkpoint, of any version, with the names of now for classes, fields, values and weights.

    `weights`: former parts of weights' names and their names now, from what holds the node.
    """
    weights = WEIGHTS.get("", {}) if weights is None else weights
    if "class" in node:
        return _current_instance(node, weights)
    if "model" in node:
        parts = node["model"]["dict"]
        spec = with_current_names(parts["spec"], weights)
        weights = {**weights, **WEIGHTS.get(spec.get("class", ""), {})}
        others = {name: with_current_names(part, weights) for name, part in parts.items() if name != "spec"}
        return {"model": {"dict": {"spec": spec} | others}}
    if "dict" in node:
        children = node["dict"].items()
        return {"dict": {_current_weight(name, at, weights): with_current_names(at, weights) for name, at in children}}
    for kind in ("tuple", "list"):
        if kind in node:
            return {kind: [with_current_names(child, weights) for child in node[kind]]}
    return node


def _current_instance(node: dict[str, Any], weights: Mapping[str, str]) -> dict[str, Any]:
    tag = FORMER.get(node["class"], node["class"])
    names, values, weights = FIELDS.get(tag, {}), VALUES.get(tag, {}), {**weights, **WEIGHTS.get(tag, {})}
    fields: dict[str, Any] = {name: {"value": value} for name, value in ADDED.get(tag, {}).items()}
    for former, child in node["fields"].items():
        name = names.get(former, former)
        if name is None:
            continue
        if isinstance(child.get("value"), str):
            child = {"value": values.get(name, {}).get(child["value"], child["value"])}
        fields[name] = with_current_names(child, weights)
    return {"class": tag, "fields": fields}


def _current_weight(name: str, child: dict[str, Any], weights: Mapping[str, str]) -> str:
    """The name of a tensor, or of what makes one, in a dict; other dicts have keys that are data."""
    return name if "value" in child else ".".join(weights.get(part, part) for part in name.split("."))

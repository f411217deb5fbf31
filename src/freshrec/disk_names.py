"""The names that files use for classes and fields. Old files still open after a class has moved or a field was renamed.

Every class that a checkpoint can hold has a *tag*, the name of the class in files, which never changes. To move or
rename a class, change its place in `CLASSES`. To rename a field, add a line to `FIELDS`. The other tables are for
values, weights, and the keys and columns of other files. `FORMER` holds the names that version 0.1.0 wrote.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

from freshrec.errors import StateError
from freshrec.former_names import FORMER
from freshrec.user_modules import ALLOW_IMPORT, is_module_name

# tag -> current place of the class. A tag never changes and never belongs to another class.
CLASSES = {
    # parts of a state
    "state": "freshrec.types:State",
    "histories": "freshrec.types:Histories",
    "events": "freshrec.types:Events",
    "impressions": "freshrec.types:Impressions",
    "interests": "freshrec.types:Interests",
    "batch-interests": "freshrec.data.stored_interests:StoredInterests",
    "targets": "freshrec.data.batches:Targets",
    "exemplars": "freshrec.learn.reservoir:TrainingSamples",
    "reservoir": "freshrec.learn.reservoir:Reservoir",
    "queries": "freshrec.replay.measure:Queries",
    "log-options": "freshrec.recommender.log_reading:ReadOptions",
    # options of models
    "blend-spec": "freshrec.models.blend.model:BlendSpec",
    "biased-mf-spec": "freshrec.models.mf_biased:BiasedMFSpec",
    "caser-spec": "freshrec.models.caser:CaserSpec",
    "embedding-mlp-spec": "freshrec.models.embedding_mlp:EmbeddingMLPSpec",
    "gru4rec-spec": "freshrec.models.gru4rec:GRU4RecSpec",
    "item-pairs-spec": "freshrec.models.item_knn:ItemKNNSpec",
    "limarec-spec": "freshrec.models.limarec:LimaRecSpec",
    "mf-spec": "freshrec.models.mf:MFSpec",
    "mimn-spec": "freshrec.models.mimn:MIMNSpec",
    "multi-interest-spec": "freshrec.models.multi_interest:InterestSpec",
    "multi-interest-published-spec": "freshrec.models.multi_interest_published:PublishedInterestSpec",
    "pooled-spec": "freshrec.models.pooled:PooledSpec",
    "popularity-spec": "freshrec.models.popularity:PopularitySpec",
    "repeat-spec": "freshrec.models.repeat:RepeatSpec",
    "sasrec-spec": "freshrec.models.sasrec:SASRecSpec",
    "session-knn-spec": "freshrec.models.session_knn:SKNNSpec",
    "stamp-spec": "freshrec.models.stamp:STAMPSpec",
    "user-knn-spec": "freshrec.models.user_knn:UserKNNSpec",
    # strategies, their parts and their memory
    "absorb-strategy": "freshrec.strategies.baselines:Absorb",
    "frozen-strategy": "freshrec.strategies.baselines:Frozen",
    "finetune-strategy": "freshrec.strategies.baselines:FineTune",
    "retrain-strategy": "freshrec.strategies.baselines:Retrain",
    "refit-strategy": "freshrec.strategies.refit:Refit",
    "fit-config": "freshrec.learn.fit:FitConfig",
    "ader-strategy": "freshrec.strategies.ader:ADER",
    "ader-s-strategy": "freshrec.strategies.ader_s:ADERS",
    "asmg-strategy": "freshrec.strategies.asmg:ASMG",
    "asmg-memory": "freshrec.strategies.asmg:ASMGMemory",
    "asmg-span": "freshrec.strategies.asmg:PastSpan",
    "weight-generator": "freshrec.learn.generators:ModelGenerator",
    "gru-generator": "freshrec.learn.generators:GRUGenerator",
    "linear-generator": "freshrec.learn.generators:MeanGenerator",
    "model-window": "freshrec.learn.generators:ModelWindow",
    "ewc-strategy": "freshrec.strategies.ewc:EWC",
    "imsr-strategy": "freshrec.strategies.imsr:IMSR",
    "interest-retainer": "freshrec.strategies.imsr:Retainer",
    "interest-detector": "freshrec.strategies.imsr:Detector",
    "interest-trimmer": "freshrec.strategies.imsr:Trimmer",
    "interest-budget": "freshrec.learn.interest_budget:InterestBudget",
    "incctr-strategy": "freshrec.strategies.incctr:IncCTR",
    "distillation": "freshrec.strategies.incctr:Distill",
    "self-tuned-strategy": "freshrec.strategies.self_tuned:SelfTuned",
    "self-tuned-memory": "freshrec.strategies.self_tuned:SelfTunedMemory",
    "training-regime": "freshrec.strategies.self_tuned:UpdateSettings",
    "sml-strategy": "freshrec.strategies.sml:SML",
    "sml-memory": "freshrec.strategies.sml:SMLMemory",
    "sml-span": "freshrec.strategies.sml:SpanData",
    "cnn-transfer": "freshrec.learn.transfer:CNNTransfer",
    "linear-transfer": "freshrec.learn.transfer:LinearTransfer",
    "mlp-transfer": "freshrec.learn.transfer:MLPTransfer",
    "spmf-strategy": "freshrec.strategies.spmf:SPMF",
    # parts of a replay
    "replay-cell": "freshrec.replay.cell:Cell",
    "replay-settings": "freshrec.replay.cell:ReplaySettings",
    "query-selection": "freshrec.replay.measure:QueryOptions",
    # options that users name, though no checkpoint holds them
    "gate-limits": "freshrec.nightly.gate:GateLimits",
}

# tag -> {former name of a field: current name; None: no longer stored}. Users may also type the former names of options
# of models, strategies and the gate.
FIELDS: dict[str, dict[str, str | None]] = {
    "ader-s-strategy": {"each": "sequences_per_user"},
    "asmg-memory": {"users": "interests", "blocks": "past_spans"},
    "asmg-span": {"carried": "stored_interests"},
    "asmg-strategy": {"rehearsals": "base_parts"},
    "batch-interests": {"users": "interests", "slots_KD": "initial_KD"},
    "blend-spec": {
        "offered": "items_per_expert",
        "remembered": "max_queries",
        "per_window": "queries_per_window",
        "others": "negatives_per_query",
    },
    "caser-spec": {"decay": "weight_decay"},
    "events": {"joins_E": "train_at_E", "kinds_E": "categories_E"},
    "gate-limits": {
        "chance": "false_alarm_rate",
        "n_users": "min_users",
        "unnoticed": "max_undetected_loss",
        "floor": "floor_share",
        "n_tails": "min_floor_versions",
        "n_recent": "n_recent_days",
        "n_earlier": "min_earlier_days",
        "fewer": "max_drop_factor",
        "more": "max_growth_factor",
        "shorter": "max_shortening_factor",
        "aside": "max_head_drop_factor",
        "few_rows": "min_rows",
        "few_users": "min_users_same_second",
        "common": "uninformative_share",
        "rise": "max_rise",
        "small_rise": "max_small_rise",
        "one_user": "max_share_top_user",
        "one_item": "max_share_top_item",
        "unknown": "max_share_unknown",
        "doubled": "max_share_doubled",
        "late": "max_share_late",
        "same_second": "max_share_same_second",
        "hole_hours": "max_hole_hours",
        "usual_hole_hours": "max_usual_hole_hours",
        "holes": "max_hole_factor",
    },
    "gru4rec-spec": {"others": "batch_negatives", "back": "bptt"},
    "histories": {"shown": "impressions", "kinds_I": "categories_I"},
    "interest-budget": {"half": "fp16"},
    "limarec-spec": {"fading": "decay"},
    "mimn-spec": {"even": "usage_penalty"},
    "popularity-spec": {"keep": "weighting"},
    "queries": {"secret_N": "heldout_N"},
    "query-selection": {"among": "n_sampled"},
    "refit-strategy": {
        "decay": "weight_decay",
        "least": "min_queries",
        "safe": "guard",
        "passes": "max_passes",
        "anew": "full_retrain",
    },
    "replay-cell": {
        "model": "model_name",
        "spec": "model_spec",
        "strategy": "strategy_name",
        "update": "strategy_instance",
    },
    "replay-settings": {"asked": "query_options"},
    "reservoir": {"kept": "samples"},
    "retrain-strategy": {"fresh": "from_scratch"},
    "self-tuned-memory": {"manner": "settings"},
    "self-tuned-strategy": {"rehearsals": "base_parts", "asked": "max_queries"},
    "sml-memory": {"block": "span_data"},
    "sml-span": {"users": "interests"},
    "sml-strategy": {
        "shrink": "weight_decay",
        "decay": "transfer_weight_decay",
        "through": "train_through_transfer",
        "until": "last_trained_span",
        "rehearsals": "base_parts",
    },
    "state": {"recent": "histories", "users": "interests", "started": "shared_base"},
    "targets": {"from_N": "first_row_N", "shown_N": "impression_items_N"},
    "training-regime": {"current": "current_negatives", "replayed": "replay_share", "averaged": "average_epochs"},
    "user-knn-spec": {"through": "users_per_item"},
    "weight-generator": {"makers": "networks"},
}

# tag -> {current name of a field: {former value: current value}}, for options that are words
VALUES: dict[str, dict[str, dict[str, str]]] = {"gru4rec-spec": {"steps": {"lanes": "session-parallel"}}}

# tag -> {field that older files lack and that has no default: its value, as in JSON}
ADDED: dict[str, dict[str, str | float | bool | None]] = {}

# tag -> fields that older files store with fewer bits; their tensors are converted to int32
INT32_FIELDS: dict[str, tuple[str, ...]] = {"interests": ("born_S", "used_S")}  # int16 in 0.1.0

# tag of a model's options or of another class, or "" for all -> {former part of a weight's name: current part}
WEIGHTS: dict[str, dict[str, str]] = {}

# former names -> current names, for the keys and columns of other files
MANIFEST_KEYS: dict[str, str] = {}  # in manifest.json of a version
NUMBER_KEYS: dict[str, str] = {}  # in "numbers" of manifest.json
DAY_KEYS: dict[str, str] = {}  # in the delivery statistics of manifest.json
MOVE_KEYS: dict[str, str] = {}  # in live.json
KINDS: dict[str, str] = {}  # values of "kind" in manifest.json and of "action" in live.json
RECIPE_KEYS: dict[str, dict[str, str]] = {  # in recipe.toml, by table
    "replay": {"also": "extra_pairs", "mean": "averaging"},
}
RANK_COLUMNS: dict[str, str] = {}  # in span-*.parquet of a replay
COST_KEYS: dict[str, str] = {  # in costs-*.json of a replay
    "manner": "lr_factor",
    "manner_cpu_s": "lr_choice_cpu_s",
    "current": "current_negatives",
    "replayed": "replay_share",
    "averaged": "average_epochs",
}
TABLE_COLUMNS: dict[str, str] = {}  # in users.parquet, items.parquet and categories.parquet


def tag_of(kind: type) -> str:
    """Return the name of a class in files: its tag, or module:qualname for a class of another package.

    Raises StateError for a class of freshrec without a tag.
    """
    place = _place(kind)
    if place in _tags():
        return _tags()[place]
    if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
        raise StateError(f"{place} cannot be saved without a tag. Add one to CLASSES in freshrec/disk_names.py.")
    return place


def foreign_modules(*instances: object) -> list[str]:
    """Return the modules outside freshrec that define the classes of these instances, each once."""
    tags = [tag_of(type(instance)) for instance in instances]
    return list(dict.fromkeys(tag.partition(":")[0] for tag in tags if ":" in tag))


def former_fields(kind: type) -> dict[str, str]:
    """Return the current name of each former field of a class, by former name."""
    return {former: name for former, name in FIELDS.get(_tags().get(_place(kind), ""), {}).items() if name}


def former_values(kind: type, field: str) -> Mapping[str, str]:
    """Return the current value of each former value of a field, by former value."""
    return VALUES.get(_tags().get(_place(kind), ""), {}).get(field, {})


def former_class_names(kind: type) -> list[str]:
    """Return the former names of a class."""
    tag = _tags().get(_place(kind))
    return [place.partition(":")[2] for place, its_tag in FORMER.items() if its_tag == tag]


def _place(kind: type) -> str:
    """Return module:qualname of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


def _tags() -> dict[str, str]:
    """Return the tag of each class by its place."""
    return {place: tag for tag, place in CLASSES.items()}


def class_of(name: str) -> type:
    """Return the dataclass with a tag, or a dataclass of the user by module:qualname.

    The module of the user must be imported already: a file never causes an import outside freshrec. Classes of freshrec
    have tags, so a file cannot name any other class of it. A custom strategy may also be a class without fields. Raises
    StateError if there is no such class.
    """
    require_modules([name])
    module, _, qualname = CLASSES.get(name, name).partition(":")
    if name in CLASSES:
        importlib.import_module(module)
    from freshrec.types import Strategy  # imported late, because it imports torch

    found = vars(sys.modules[module]).get(qualname)
    if not (isinstance(found, type) and (is_dataclass(found) or issubclass(found, Strategy))):
        raise StateError(
            f"The state needs the dataclass {module}:{qualname[:60]}, which is missing. Upgrade freshrec or that "
            "module."
        )
    return found


NOT_OF_USERS = {"freshrec", *sys.stdlib_module_names}  # packages that hold no model or strategy of a user


def require_modules(names: Iterable[str]) -> None:
    """Raise StateError unless the modules of all these classes, which a file names, are imported. Imports nothing."""
    missing: list[str] = []
    for name in names:
        module, colon, _ = name.partition(":")
        if name in CLASSES:
            continue
        if not colon or not is_module_name(module) or module.partition(".")[0] in NOT_OF_USERS:
            printable = "".join(filter(str.isprintable, name[:60]))
            raise StateError(
                f'The state needs the class "{printable}", which this version of freshrec does not have. '
                "Upgrade freshrec."
            )
        if module not in sys.modules and module not in missing:
            missing.append(module)
    if missing:
        is_are = "module {}, which is" if len(missing) == 1 else "modules {}, which are"
        options = " ".join(f"{ALLOW_IMPORT} {module}" for module in missing)
        raise StateError(
            f"The state needs {is_are.format(' and '.join(missing))} not imported. If you trust the code, add "
            f"{options} to the command, or write `import {', '.join(missing)}` in Python."
        )


def with_current_keys(content: Any, keys: Mapping[str, str]) -> Any:
    """Return a JSON value. If it is a dict, its keys get their current names."""
    return {keys.get(key, key): value for key, value in content.items()} if isinstance(content, dict) else content


def current_manifest(content: Any) -> Any:
    """Return the content of a manifest.json of any version, with current names."""
    found = with_current_keys(content, MANIFEST_KEYS)
    if not isinstance(found, dict):
        return found
    if isinstance(data := found.get("data"), dict) and "day" in data:
        found["data"] = data | {"day": with_current_keys(data["day"], DAY_KEYS)}
    if "numbers" in found:
        found["numbers"] = with_current_keys(found["numbers"], NUMBER_KEYS)
    return _current_word(found, "kind", KINDS)


def current_move(content: Any) -> Any:
    """Return a move in a live.json of any version, with current names."""
    found = with_current_keys(content, MOVE_KEYS)
    return _current_word(found, "action", KINDS) if isinstance(found, dict) else found


def _current_word(content: dict[str, Any], key: str, words: Mapping[str, str]) -> dict[str, Any]:
    """Replace a former word that is the value of `key`."""
    word = content.get(key)
    return content | {key: words[word]} if isinstance(word, str) and word in words else content


def with_current_names(node: dict[str, Any], weights: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return an encoded tree of a checkpoint of any version, with current names of classes, fields, values and weights.

    `weights`: former parts of weight names -> current parts, from the parents of the node.
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
        children = {
            _current_weight(name, child, weights): with_current_names(child, weights)
            for name, child in node["dict"].items()
        }
        return {"dict": children}
    for kind in ("tuple", "list"):
        if kind in node:
            return {kind: [with_current_names(child, weights) for child in node[kind]]}
    return node


def _current_instance(node: dict[str, Any], weights: Mapping[str, str]) -> dict[str, Any]:
    """Return an encoded dataclass with current names."""
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
    """Return the current name of an entry of a dict. The name of a plain value is data and stays."""
    return name if "value" in child else ".".join(weights.get(part, part) for part in name.split("."))

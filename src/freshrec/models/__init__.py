"""Models by name. A line each; an option is a field of the spec, a variant another instance."""

from dataclasses import replace

from freshrec.models.blend import BlendSpec
from freshrec.models.comirec import COMIREC_DR, COMIREC_SA
from freshrec.models.embedding_mlp import EmbeddingMLPSpec
from freshrec.models.mf import MFSpec
from freshrec.models.mf_biased import BiasedMFSpec
from freshrec.models.mind import MIND
from freshrec.models.pairs import PairsSpec
from freshrec.models.pooled import PooledSpec
from freshrec.models.popularity import PopularitySpec
from freshrec.models.repeat import RepeatSpec
from freshrec.models.sasrec import SASRecSpec
from freshrec.models.user_knn import UserKNNSpec
from freshrec.options import choose
from freshrec.types import ModelSpec

CONTROLS: dict[str, ModelSpec] = {
    "popularity": PopularitySpec(),
    "popularity-last": PopularitySpec(keep="last"),
    "popularity-decay": PopularitySpec(keep="decay"),
    "repeat-last": RepeatSpec(),
    "item-knn": PairsSpec(),
}

COUNTERS: dict[str, ModelSpec] = CONTROLS | {  # they have no randomness: one seed is all of them
    "markov": PairsSpec(kind="markov"),
    "user-knn": UserKNNSpec(),
}

MODELS: dict[str, ModelSpec] = COUNTERS | {
    "blend": BlendSpec(),
    "mf": MFSpec(),
    "mf-biased": BiasedMFSpec(),
    "embedding-mlp": EmbeddingMLPSpec(),
    "pooled": PooledSpec(),
    "sasrec": SASRecSpec(),
    "mind": MIND,
    "comirec-dr": COMIREC_DR,
    "comirec-sa": COMIREC_SA,
    "mind-k1": replace(MIND, k=1),
    "comirec-dr-k1": replace(COMIREC_DR, k=1),
    "comirec-sa-k1": replace(COMIREC_SA, k=1),
}


def find_model(text: str) -> ModelSpec:
    """The spec that "comirec-dr" or "comirec-dr:k=1:attention=soft" names; OptionError for what does not exist."""
    return choose("model", text, MODELS)

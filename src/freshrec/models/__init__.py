"""Table of models by name. An option is a field of the spec; a variant is another instance of the spec."""

from dataclasses import replace

from freshrec.config import find_instance
from freshrec.models.blend.model import BlendSpec
from freshrec.models.caser import CaserSpec
from freshrec.models.comirec import COMIREC_DR, COMIREC_SA
from freshrec.models.embedding_mlp import EmbeddingMLPSpec
from freshrec.models.gru4rec import GRU4RecSpec
from freshrec.models.item_knn import ItemKNNSpec
from freshrec.models.limarec import LimaRecSpec
from freshrec.models.mf import MFSpec
from freshrec.models.mf_biased import BiasedMFSpec
from freshrec.models.mimn import MIMNSpec
from freshrec.models.mind import MIND
from freshrec.models.multi_interest_published import COMIREC_DR_PUBLISHED, COMIREC_SA_PUBLISHED, MIND_PUBLISHED
from freshrec.models.pooled import PooledSpec
from freshrec.models.popularity import PopularitySpec
from freshrec.models.repeat import RepeatSpec
from freshrec.models.sasrec import SASRecSpec
from freshrec.models.session_knn import S_SKNN, SKNN, STAN, V_SKNN
from freshrec.models.stamp import STAMPSpec
from freshrec.models.user_knn import UserKNNSpec
from freshrec.types import ModelSpec
from freshrec.user_modules import Interface, as_instance

CONTROLS: dict[str, ModelSpec] = {
    "popularity": PopularitySpec(),
    "popularity-last": PopularitySpec(weighting="last"),
    "popularity-decay": PopularitySpec(weighting="decay"),
    "repeat-last": RepeatSpec(),
    "item-knn": ItemKNNSpec(),
}

COUNTING_MODELS: dict[str, ModelSpec] = CONTROLS | {  # deterministic: one seed is enough
    "markov": ItemKNNSpec(kind="markov"),
    "user-knn": UserKNNSpec(),
    "sknn": SKNN,
    "s-sknn": S_SKNN,
    "v-sknn": V_SKNN,
    "stan": STAN,
}

MODELS: dict[str, ModelSpec] = COUNTING_MODELS | {
    "blend": BlendSpec(),
    "mf": MFSpec(),
    "mf-biased": BiasedMFSpec(),
    "embedding-mlp": EmbeddingMLPSpec(),
    "pooled": PooledSpec(),
    "sasrec": SASRecSpec(),
    "gru4rec": GRU4RecSpec(),
    "stamp": STAMPSpec(),
    "stmp": STAMPSpec(kind="stmp"),
    "caser": CaserSpec(),
    "mind": MIND,
    "comirec-dr": COMIREC_DR,
    "comirec-sa": COMIREC_SA,
    "mind-k1": replace(MIND, k=1),
    "comirec-dr-k1": replace(COMIREC_DR, k=1),
    "comirec-sa-k1": replace(COMIREC_SA, k=1),
    "mind-original": MIND_PUBLISHED,
    "comirec-dr-original": COMIREC_DR_PUBLISHED,
    "comirec-sa-original": COMIREC_SA_PUBLISHED,
    "limarec": LimaRecSpec(),
    "mimn": MIMNSpec(),
}


INTERFACE = Interface(ModelSpec, "build(seed)")


def find_model(named: str | ModelSpec | type[ModelSpec]) -> ModelSpec:
    """Return the spec for a name such as "comirec-dr", "comirec-dr:k=1:attention=soft" or "my_module:MySpec".

    A custom spec is returned unchanged, and a spec class is instantiated with its defaults. Raises OptionError for
    anything that is not a spec.
    """
    if isinstance(named, str):
        return find_instance("model", named, MODELS, INTERFACE)
    name = named.__name__ if isinstance(named, type) else type(named).__name__
    found: ModelSpec = as_instance("model", name, named, INTERFACE)
    return found

"""Models by name. An option is a field of the spec. A variant is another instance of the spec."""

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

# Name: the options, and one sentence on what is different about the model, for `freshrec list` and docs/reference.md.
_CONTROL_TABLE: dict[str, tuple[ModelSpec, str]] = {
    "popularity": (PopularitySpec(), "The items with the most events, the same for all users."),
    "popularity-last": (PopularitySpec(weighting="last"), "Popularity in the most recent window of events only."),
    "popularity-decay": (PopularitySpec(weighting="decay"), "Popularity with event weights that halve per window."),
    "repeat-last": (RepeatSpec(), "The user's own past items, the most recent first."),
    "item-knn": (ItemKNNSpec(), "Items that occur near the user's recent items in other histories."),
}
_COUNTING_TABLE: dict[str, tuple[ModelSpec, str]] = _CONTROL_TABLE | {
    "markov": (ItemKNNSpec(kind="markov"), "Item-kNN with pairs in order of time, recent pairs weighing more."),
    "user-knn": (UserKNNSpec(), "Recent items of the users most similar to this one."),
    "sknn": (SKNN, "Session-kNN by cosine similarity. Positions in the session have no effect."),
    "s-sknn": (S_SKNN, "Session-kNN that favours neighbours with late items of the session."),
    "v-sknn": (V_SKNN, "Session-kNN that weights late items in both similarity and score."),
    "stan": (STAN, "Session-kNN that decays with position, session age and item distance."),
}
MODEL_TABLE: dict[str, tuple[ModelSpec, str]] = _COUNTING_TABLE | {
    "blend": (BlendSpec(), "Counting experts and a trained one, combined by learned weights. The default."),
    "mf": (MFSpec(), "Matrix factorisation. One vector per user and item, sampled softmax."),
    "mf-biased": (BiasedMFSpec(), "Matrix factorisation with biases. Predicts click probabilities."),
    "embedding-mlp": (EmbeddingMLPSpec(), "A small network over user, history and item. Predicts click probabilities."),
    "pooled": (PooledSpec(), "The decayed mean of the history's item vectors. No attention, no layers."),
    "sasrec": (SASRecSpec(), "Causal self-attention over the history."),
    "gru4rec": (GRU4RecSpec(), "A recurrent network (GRU) over the history."),
    "stamp": (STAMPSpec(), "Attention over the session, combined with its last item."),
    "stmp": (STAMPSpec(kind="stmp"), "STAMP with the mean of the session instead of attention."),
    "caser": (CaserSpec(), "Convolutions over the last few items, with a vector per user."),
    "mind": (MIND, "Several interests by noisy routing. Each target trains all of them."),
    "comirec-dr": (COMIREC_DR, "Several interests by routing. Each target trains only the closest one."),
    "comirec-sa": (COMIREC_SA, "Several interests by self-attention. Each target trains only the closest one."),
    "mind-k1": (replace(MIND, k=1), "MIND in which a new user has one interest, not four."),
    "comirec-dr-k1": (replace(COMIREC_DR, k=1), "ComiRec-DR in which a new user has one interest, not four."),
    "comirec-sa-k1": (replace(COMIREC_SA, k=1), "ComiRec-SA in which a new user has one interest, not four."),
    "mind-original": (MIND_PUBLISHED, "MIND as published. Stores no interests between updates."),
    "comirec-dr-original": (COMIREC_DR_PUBLISHED, "ComiRec-DR as published. Stores no interests between updates."),
    "comirec-sa-original": (COMIREC_SA_PUBLISHED, "ComiRec-SA as published. Stores no interests between updates."),
    "limarec": (LimaRecSpec(), "Several interests by causal linear attention (after LimaRec)."),
    "mimn": (MIMNSpec(), "Several interests from memory slots that each event reads and writes."),
}


def _specs(table: dict[str, tuple[ModelSpec, str]]) -> dict[str, ModelSpec]:
    return {name: spec for name, (spec, _) in table.items()}


CONTROLS = _specs(_CONTROL_TABLE)  # baselines that every replay includes
COUNTING_MODELS = _specs(_COUNTING_TABLE)  # they draw no random numbers, so one seed is enough
MODELS = _specs(MODEL_TABLE)
INTERFACE = Interface(ModelSpec, "build(seed)")


def find_model(named: str | ModelSpec | type[ModelSpec]) -> ModelSpec:
    """Return the spec called "comirec-dr", "comirec-dr:k=1:attention=soft" or "their_package.module:Thing".

    An instance is returned unchanged. A class of options is instantiated, and a class of models stands for its options.
    Raises OptionError for anything else.
    """
    if isinstance(named, str):
        return find_instance("model", named, MODELS, INTERFACE)
    name = named.__name__ if isinstance(named, type) else type(named).__name__
    found: ModelSpec = as_instance("model", name, named, INTERFACE)
    return found

"""freshrec, with the default options of each model except the length of histories."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from protocol import LENGTH, Data, main, once, search

from freshrec.data.batches import due_targets
from freshrec.data.histories import append_events
from freshrec.learn.fit import stored_interests_of, train
from freshrec.models import COUNTING_MODELS, find_model
from freshrec.nn.scoring import score_items
from freshrec.types import Batch, Events, Histories, TrainedModel


def run(data: Data, name: str) -> dict[str, Any]:
    spec: Any = find_model(name)
    model = (spec if name in COUNTING_MODELS else replace(spec, length=LENGTH)).build(0)
    model.grow(data.n_users, data.n_items)
    users, items = data.training()
    events = Events.trainable(torch.from_numpy(users), torch.from_numpy(items).long())
    recent = append_events(Histories.empty(), events, data.n_users)
    every = torch.arange(1, data.n_items + 1)

    def score(users: Any, histories: Any) -> Any:
        history_BT = torch.from_numpy(histories)
        batch = Batch(torch.from_numpy(users), history_BT[:, -max(1, int((history_BT > 0).sum(1).max())) :])
        return np.pad(score_items(model, batch, every).numpy(), ((0, 0), (1, 0)))

    if isinstance(model, TrainedModel):
        carried = stored_interests_of(model, None, 0)
        return search(data, train(model, due_targets(recent), 1000, (0, 0), stored_interests=carried), score)
    return search(data, once(lambda: model.absorb(events, Histories.empty())), score)


if __name__ == "__main__":
    main(run)

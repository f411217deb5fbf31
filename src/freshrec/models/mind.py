"""MIND as IMSR restates it: shared transform, noisy routing, soft label attention with a power (see multi_interest.py).

Differs from ComiRec-DR by the noise in the routing logits while training, and by the soft attention.
"""

from freshrec.models.multi_interest import InterestSpec

MIND = InterestSpec(extractor="routing", noise=1.0, attention="soft", power=2.0)

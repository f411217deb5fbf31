"""MIND as restated in the IMSR paper: one shared transform, noisy routing, and soft label attention with a power.

These are options of multi_interest.py. Differs from ComiRec-DR by noise in the routing logits during training, and by
soft attention.
"""

from freshrec.models.multi_interest import InterestSpec

MIND = InterestSpec(extractor="routing", noise=1.0, attention="soft", power=2.0)

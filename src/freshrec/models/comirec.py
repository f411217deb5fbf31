"""ComiRec as IMSR restates it: dynamic routing (DR) or self-attention (SA), hard attention (see multi_interest.py).

Differs from ComiRec: one transform for all positions and interests, because the number of interests varies by user.
"""

from freshrec.models.multi_interest import InterestSpec

COMIREC_DR = InterestSpec(extractor="routing")
COMIREC_SA = InterestSpec(extractor="attention", lr=0.006)

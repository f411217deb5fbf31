"""ComiRec as restated in the IMSR paper: dynamic routing (DR) or self-attention (SA), with hard label attention.

These are options of multi_interest.py. Differs from ComiRec: all positions and interests share one transform, because
the number of interests varies by user.
"""

from freshrec.models.multi_interest import InterestSpec

COMIREC_DR = InterestSpec(extractor="routing")
COMIREC_SA = InterestSpec(extractor="attention", lr=0.006)

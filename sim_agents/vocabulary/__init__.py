"""Motion vocabularies: finite sets of half-second motions, and recorded motion told in them."""

from sim_agents.vocabulary.encode import Encoding, closest_tokens, encode
from sim_agents.vocabulary.motion import MotionState, MotionVocabulary, ShapeVocabulary, VerletVocabulary, class_of
from sim_agents.vocabulary.store import load_vocabulary, save_vocabulary

__all__ = [
    "Encoding",
    "MotionState",
    "MotionVocabulary",
    "ShapeVocabulary",
    "VerletVocabulary",
    "class_of",
    "closest_tokens",
    "encode",
    "load_vocabulary",
    "save_vocabulary",
]

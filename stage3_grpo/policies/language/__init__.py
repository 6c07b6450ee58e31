"""A vision-language model as a policy of stage 3."""

from stage3_grpo.policies.language.data import PromptData
from stage3_grpo.policies.language.policy import LanguagePolicy
from stage3_grpo.policies.language.publish import PublishModel

__all__ = ["LanguagePolicy", "PromptData", "PublishModel"]

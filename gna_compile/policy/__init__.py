"""The policy: which layers are rewritten, with which windows, in which phase of a run.

    policy = load_policy("hunyuan-video-720p")          # shipped name, path of a YAML file, or dict
    rule = policy.rule_for(LayerFacts("transformer_blocks.3.attn", tokens=115456), "default")
    window, stride, dilation, causal = rule.parameters((30, 48, 80))

Importing this package needs neither torch nor pydantic nor yaml; the last two load with the first
policy.
"""

from gna_compile.policy.errors import PolicyError, PolicyMismatch
from gna_compile.policy.load import (
    clear_cache,
    json_schema,
    load_policy,
    policy_text,
    shipped_policies,
)
from gna_compile.policy.rules import (
    DEFAULT_PHASE,
    DeclaredLayout,
    LayerFacts,
    Parameters,
    Phase,
    Policy,
    Rule,
)

__all__ = [
    "DEFAULT_PHASE",
    "DeclaredLayout",
    "LayerFacts",
    "Parameters",
    "Phase",
    "Policy",
    "PolicyError",
    "PolicyMismatch",
    "Rule",
    "clear_cache",
    "json_schema",
    "load_policy",
    "policy_text",
    "shipped_policies",
]

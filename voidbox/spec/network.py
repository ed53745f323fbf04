"""What a spec says of a box's network as the policy that its gateway decides by."""

from __future__ import annotations

from services.common.egress import presets
from services.common.egress.policy import Limits, Policy, Rule, make_rule
from voidbox.spec.models import Llm, Network, NetworkPreset, NetworkRule, Provider, RuleTls


def rule_of(rule: NetworkRule) -> Rule:
    """One rule.

    Raises:
        ValueError: what is wrong with it.
    """
    return make_rule(
        host=rule.host or "",
        cidr=rule.cidr or "",
        ports=rule.ports,
        protocol=rule.protocol.value,
        addresses=rule.addresses,
        tls="" if rule.tls is RuleTls.NAME else rule.tls.value,
    )


def policy_of(network: Network | None, llm: Llm | None = None) -> Policy | None:
    """The policy of a checked spec; None for a box without a network device.

    Args:
        network: What the spec says.
        llm: The model of the box's agent, for the preset `llm`.

    Raises:
        ValueError: a rule or the model's address is wrong.
    """
    if network is None or not network.enabled:
        return None
    allow: tuple[Rule, ...] = ()
    ports: tuple[int, ...] = ()
    match network.preset:
        case NetworkPreset.INTERNET:
            allow = presets.internet()
        case NetworkPreset.PACKAGES:
            allow = presets.packages()
        case NetworkPreset.LLM:
            provider = llm.provider if llm is not None else Provider.CLAUDE
            allow, needed = presets.provider(provider.value, (llm.base_url if llm is not None else "") or "")
            ports = tuple(needed)
        case NetworkPreset.NONE:
            pass
    limits = network.limits
    return Policy(
        enabled=True,
        allow=(*(rule_of(rule) for rule in network.allow), *allow),
        deny=tuple(rule_of(rule) for rule in network.deny),
        host_ports=tuple(dict.fromkeys((*network.host_ports, *ports))),
        limits=Limits(
            connections=limits.connections,
            new_per_second=limits.new_per_second,
            bytes_per_second=limits.kb_per_second << 10,
            total_bytes=limits.total_mb << 20,
        ),
        learn=network.learn,
    )

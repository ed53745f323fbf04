"""The nftables rules of a box's namespace: all TCP and all DNS go to the gateway, nothing goes anywhere else.

What is left (ICMP, other UDP) the gateway sees on its packet socket, which comes before these rules.
"""

from __future__ import annotations

from services.hypervisor.egress.link import TAP

# A flood of connections would fill the kernel's table of them, which is the host's memory.
NEW_PER_SECOND = 2000


def ruleset(tcp: int, dns: int) -> str:
    """The rules as `nft -f` takes them.

    Args:
        tcp: Port of the listening sockets for connections.
        dns: Port of the sockets for DNS, by UDP and TCP.
    """
    flood = f"limit rate over {NEW_PER_SECOND}/second burst {NEW_PER_SECOND} packets"
    return f"""\
table inet voidbox {{
    chain arriving {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "{TAP}" udp dport 53 redirect to :{dns}
        iifname "{TAP}" tcp dport 53 redirect to :{dns}
        iifname "{TAP}" meta l4proto tcp redirect to :{tcp}
    }}
    chain flood {{
        type filter hook prerouting priority mangle; policy accept;
        iifname "{TAP}" ct state new {flood} drop
        iifname "{TAP}" ct state invalid drop
    }}
    chain incoming {{
        type filter hook input priority filter; policy drop;
        iifname "{TAP}" ct status dnat accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
    }}
    chain forwarded {{
        type filter hook forward priority filter; policy drop;
    }}
}}
"""

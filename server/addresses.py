"""Addresses of clients and proxies."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from pydantic import IPvAnyNetwork


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """None for what is no address. An IPv4 address is one in whichever way a socket for both kinds says it, and the
    interface that the kernel may name is left out."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def is_in(address: IPv4Address | IPv6Address | None, networks: Sequence[IPvAnyNetwork]) -> bool:
    return address is not None and any(address in network for network in networks)

"""Addresses of clients and proxies."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from pydantic import IPvAnyNetwork


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """None if `text` is no address. An IPv4 address in IPv6 notation becomes IPv4; an interface suffix is dropped."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def is_in(address: IPv4Address | IPv6Address | None, networks: Sequence[IPvAnyNetwork]) -> bool:
    return address is not None and any(address in network for network in networks)

"""A box's own certificate authority, good for nothing but the names that its rules mention.

Source: RFC 5280 §4.2.1.10 (name constraints). The guest trusts it; were its key to leak, it could
still vouch for no other name and for no address.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import ssl
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.egress.names import matches

# Longer than any box lives, shorter than the 398 days that programs accept.
VALID: Final = datetime.timedelta(days=365)
# A guest's clock may be behind the host's.
SLACK: Final = datetime.timedelta(days=1)
# Contexts with a certificate each; one costs about 50 kB, a box has few names.
KEPT_LEAVES: Final = 256


class BoxAuthority:
    """Makes certificates for the names under its constraints.

    Args:
        key: Its private key.
        certificate: Its certificate.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: OrderedDict[str, ssl.SSLContext] = OrderedDict()
        self._prepared: dict[str, ssl.SSLContext] = {}

    @classmethod
    def create(cls, hosts: Iterable[str]) -> BoxAuthority:
        """A new authority for `hosts`: DNS names, `*.` and a suffix, or addresses; `*` is every server."""
        hosts = set(hosts)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"voidbox {secrets.token_hex(4)}")])
        permitted = [_constraint(host) for host in sorted(hosts - {"*"})]
        excluded: list[x509.GeneralName] = []
        if not any(isinstance(one, x509.DNSName) for one in permitted):
            excluded.append(x509.DNSName(""))
        if not any(isinstance(one, x509.IPAddress) for one in permitted):
            excluded += [x509.IPAddress(ipaddress.ip_network(all_)) for all_ in ("0.0.0.0/0", "::/0")]
        now = datetime.datetime.now(datetime.UTC)
        public = key.public_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SLACK)
            .not_valid_after(now + VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        if "*" not in hosts:
            limits = x509.NameConstraints(permitted or None, excluded or None)
            builder = builder.add_extension(limits, critical=True)
        return cls(key, builder.sign(key, hashes.SHA256()))

    @classmethod
    def load(cls, pem: bytes) -> BoxAuthority:
        """The authority that `dump` has written."""
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(key, x509.load_pem_x509_certificate(pem))

    def dump(self) -> bytes:
        """Private key and certificate, PEM. A secret of the host."""
        return _private(self._key) + self.certificate

    @property
    def certificate(self) -> bytes:
        """What the guest trusts, PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def context(self, name: str) -> ssl.SSLContext:
        """How to be the server `name`. HTTP/2 and HTTP/1.1 are offered.

        A client that asks for another name than `name` is refused: what the gateway has read from
        the handshake and what TLS reads from it must be the same.
        """
        name = name.lower()
        parent = f"*.{name.partition('.')[2]}"
        prepared = self._prepared.get(name) or self._prepared.get(parent)
        if prepared is not None:
            return prepared
        known = self._contexts.pop(name, None)
        if known is None:
            known = self._make_context(name)
            if len(self._contexts) >= KEPT_LEAVES:
                self._contexts.popitem(last=False)
        self._contexts[name] = known
        return known

    def prepare(self, hosts: Iterable[str]) -> None:
        """Make what `hosts` need now, as a confined process cannot: certificates are read from files.

        For `*.` and a suffix there is one certificate, good for names with one more label.
        """
        for host in hosts:
            if host == "*":
                continue
            self._prepared[host.lower()] = self._make_context(host.lower())

    def _make_context(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2", "http/1.1"])
        # A resumed session would skip the certificate; there is one hop of loopback, no need for it.
        context.options |= ssl.OP_NO_TICKET
        context.sni_callback = _expect(name)
        pem = self._leaf(name) + self.certificate + _private(self._leaf_key)
        # `ssl` takes certificates from files only; this one never has a name in a file system.
        descriptor = os.memfd_create("leaf", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return context

    def _leaf(self, name: str) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        public = self._leaf_key.public_key()
        issuer = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        leaf = (
            x509.CertificateBuilder()
            # A common name may have 64 characters; programs read the alternative name.
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SLACK)
            .not_valid_after(now + VALID - SLACK)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name)]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return leaf.public_bytes(serialization.Encoding.PEM)


def _expect(name: str) -> Any:
    def check(_: object, asked: str | None, __: object) -> int | None:
        if asked is not None and not matches(name, asked.lower().rstrip(".")):
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        return None

    return check


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _constraint(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_network(host))
    except ValueError:
        # A DNS constraint holds for the name and all below it; a leading dot is not RFC 5280's.
        return x509.DNSName(host.removeprefix("*.").lower())


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

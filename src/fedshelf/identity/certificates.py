"""X.509 certificates: authorities, and what they issue to servers and stores."""

import datetime
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedshelf.core.errors import IdentityError
from fedshelf.identity.keys import KeyPair, PublicKey

MAX_COMMON_NAME = 64  # characters (RFC 5280, ub-common-name)
BACKDATED = datetime.timedelta(hours=24)
"""How long before it is issued a store's certificate begins, because clocks differ."""


def pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate (DER) in hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def authority(
    keys: KeyPair, name: x509.Name, *, start: datetime.datetime, end: datetime.datetime
) -> x509.Certificate:  # fmt: skip
    """Create a certificate authority's certificate.

    Args:
        keys: the authority's keys; a renewed certificate has the same.
        name: its name; that of a renewed certificate is the same.
        start: start of validity.
        end: end of validity.

    Returns:
        The self-signed certificate.
    """
    return (
        _builder(name, name, keys.private.public_key(), start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(keys.private, hashes.SHA256())
    )


def issue(
    issuer: x509.Certificate, issuer_keys: KeyPair, public_key: ec.EllipticCurvePublicKey, common_name: str, *,
    start: datetime.datetime, end: datetime.datetime, names: Iterable[x509.GeneralName] = (),
) -> x509.Certificate:  # fmt: skip
    """Issue a certificate: to a server if it has `names`, else to a client.

    Args:
        issuer: the authority's certificate.
        issuer_keys: the authority's keys.
        public_key: the key to certify.
        common_name: the subject's name.
        start: start of validity.
        end: end of validity. One after that of the authority lasts if the authority is renewed.
        names: the server's names and addresses.

    Returns:
        The certificate.
    """
    names = list(names)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
    issuer_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(subject(common_name), issuer.subject, public_key, start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_keys.private, hashes.SHA256())


def signing_request(keys: KeyPair) -> str:
    """Create a signing request (PEM). It proves that its sender has the private key."""
    request = x509.CertificateSigningRequestBuilder().subject_name(subject("FedShelf store"))
    return request.sign(keys.private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode("ascii")


def requested_key(request: str) -> tuple[ec.EllipticCurvePublicKey, PublicKey]:
    """Read the key of a signing request.

    Args:
        request: what `signing_request` returned, from a peer.

    Returns:
        The key.

    Raises:
        IdentityError: it is not a request for a P-256 key, signed with that key.
    """
    try:
        parsed = x509.load_pem_x509_csr(request.encode("ascii"))
        key = parsed.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("not a P-256 key")
        if not parsed.is_signature_valid:
            raise ValueError("not signed with its key")
    except (ValueError, TypeError, x509.UnsupportedGeneralNameType) as error:
        raise IdentityError("this is not a signing request for a P-256 key, signed with that key") from error
    return key, PublicKey.of(key)


def subject(common_name: str) -> x509.Name:
    """A subject with a common name, cut to what a certificate holds."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:MAX_COMMON_NAME])])


def _builder(
    name: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, start: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip

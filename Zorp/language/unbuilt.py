"""Names that policies get from `Zorp.Core` and that this release cannot serve yet.

A policy may import these names without harm: most do so through a star import and never use
them.  Using one is an error at load, with file and line, because a firewall that ignored an
encryption or authentication policy would fail open.
"""

from __future__ import annotations

from Zorp.Exceptions import PolicyError


def _unbuilt(name: str, subject: str) -> type:
    def refuse(self, *args, **keywords):
        raise PolicyError(f"{name} is not built yet",
                          remedy=f"this release has no {subject}; take it out of the policy")

    return type(name, (), {"__init__": refuse, "__doc__": f"Refused at load: this release has no {subject}."})


_NAMES = {
    "authentication": (
        "AuthCache", "AuthPolicy", "AuthenticationPolicy", "InbandAuthentication",
    ),
    "protocol detection": (
        "AbstractDetector", "CertDetector", "DetectorPolicy", "HttpDetector", "SshDetector", "SNIDetector",
    ),
    "TLS": (
        "Certificate", "CertificateCA", "ClientCertificateVerifier", "ClientOnlyEncryption",
        "ClientOnlyStartTLSEncryption", "ClientSSLOptions", "DynamicCertificate", "EncryptionPolicy",
        "FakeStartTLSEncryption", "ForwardStartTLSEncryption", "PrivateKey", "SNIBasedCertificate",
        "ServerCertificateVerifier", "ServerOnlyEncryption", "ServerSSLOptions", "StaticCertificate",
        "TLSEncryption", "TwoSidedEncryption", "X509KeyBridge", "X509KeyManager",
    ),
}
globals().update({name: _unbuilt(name, subject) for subject, names in _NAMES.items() for name in names})
__all__ = [name for names in _NAMES.values() for name in names]

# Values that policies give to `self.ssl` and compare with: a policy that mentions them reaches the
# place that says what is not built, and does not end with a missing name before it.
SSL_NONE, SSL_FORCE_SSL, SSL_ACCEPT_STARTTLS, SSL_FORWARD_STARTTLS = range(4)
SSL_VERIFY_NONE = 0
SSL_VERIFY_OPTIONAL = SSL_VERIFY_OPTIONAL_UNTRUSTED = 1
SSL_VERIFY_OPTIONAL_TRUSTED = 2
SSL_VERIFY_REQUIRED_UNTRUSTED = 3
SSL_VERIFY_REQUIRED_TRUSTED = 4
SSL_HSO_CLIENT_SERVER, SSL_HSO_SERVER_CLIENT = range(2)
SSL_HS_ACCEPT, SSL_HS_REJECT, SSL_HS_POLICY, SSL_HS_VERIFIED = 1, 3, 6, 10
SSL_METHOD_SSLV2, SSL_METHOD_SSLV3 = "SSLv2", "SSLv3"
SSL_METHOD_SSLV23 = SSL_METHOD_ALL = "SSLv23"
SSL_METHOD_TLSV1, SSL_METHOD_TLSV1_1, SSL_METHOD_TLSV1_2 = "TLSv1", "TLSv1_1", "TLSv1_2"
SSL_CIPHERS_ALL = "ALL:!aNULL:@STRENGTH"
SSL_CIPHERS_HIGH = "HIGH:!aNULL:@STRENGTH"
SSL_CIPHERS_MEDIUM = "HIGH:MEDIUM:!aNULL:@STRENGTH"
SSL_CIPHERS_LOW = "HIGH:MEDIUM:LOW:EXPORT:!aNULL:@STRENGTH"
SSL_CIPHERS_CUSTOM = ""
SSL_ERROR, SSL_DEBUG, SSL_INFO, SSL_VIOLATION = "core.error", "core.debug", "core.info", "core.violation"

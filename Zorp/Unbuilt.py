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

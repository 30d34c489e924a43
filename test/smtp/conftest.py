"""Fixtures of the mail plays."""

from __future__ import annotations

from test.smtp.play import mail
from test.support.proxies import serve

__all__ = ["mail", "serve"]

"""Sockets: streams with deadlines, connecting, relaying.  No policy and no log lives here."""

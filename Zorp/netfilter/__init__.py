"""Policies to packet rules, sets and routes, and those into the kernel."""

"""A proxy or a program on the payload of another proxy, and what its verdict means."""

"""Behind Rule(): conditions, best match, warnings about rules that never match, the plain description of a policy."""

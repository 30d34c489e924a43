"""What every proxy written by us stands on: life cycle, attributes with their access rights, policy hashes."""

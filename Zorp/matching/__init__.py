"""Behind matchers and resolvers: host names over DNS, bounded patterns, probing a recipient at a mail server."""

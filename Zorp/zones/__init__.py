"""Behind Zone(): prefix tables, the forms of older releases, zones made of host names."""

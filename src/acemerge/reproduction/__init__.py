"""The experiments of the ACE paper as packs of data: which experts, test sets and rules, and what was published."""

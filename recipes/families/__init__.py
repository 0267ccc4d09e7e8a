"""How `list_patchable_families.py` builds small models of every family, and what it asks of them."""

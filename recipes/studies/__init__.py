"""What `study.py` reads, and the report that it makes of finished runs. The YAML files beside are studies."""

"""Measurements that the project's promises rest on, for anyone to repeat on their own machines.

* `save`  how long a checkpoint stops training, beside a plain write of as many bytes, and what memory it takes
"""

"""
The library behind the scripts.

The Hub-facing files (`configuration_siq_vl`, `modeling_siq_vl`, `processing_siq_vl`) live in the repository root, where
the Hub wants them, and import each other relatively. With that folder on this package's path they are its submodules:
scripts and tests write `siq_vl.modeling_siq_vl`, with no install.
"""

import os

__path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

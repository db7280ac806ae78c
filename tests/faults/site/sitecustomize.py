"""Imported by Python itself before a real command begins, where `breaking.environment` put this folder on the path."""

import json
import os

from tests.faults.breaking import VARIABLE, arm

arm(json.loads(os.environ[VARIABLE]))

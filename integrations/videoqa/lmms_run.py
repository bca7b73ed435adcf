"""lmms-eval's own command with this package's model and tasks in it, installed or not.

``evaluate`` starts it as a process, or several; its options are those of lmms-eval.
"""

from __future__ import annotations

from lmms_eval.cli.dispatch import main
from lmms_eval.models import MODEL_REGISTRY_V2

from integrations.videoqa.lmms_plugin import manifests

if __name__ == "__main__":
    MODEL_REGISTRY_V2.register_manifest(manifests(), overwrite=True)
    main()

"""Local arithmetic: one function per fused operation. No process group is known here."""

"""The personal-data gate: finds e-mail addresses, telephone and record numbers, and names in a header.

It is a filter on patterns, made for published text, where such data is an accident. It is no de-identification of
clinical notes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

KINDS = ("email", "phone", "record_number", "name")
"""What is looked for."""

HEADER_LINES = 12
"""Names are looked for in this many first lines: where letters and notes have their header."""

_LETTERS = r"A-Za-zÀ-ÖØ-öø-ÿ"
_EMAIL = re.compile(
    rf"(?<![\w.+-])[\w.+-]+(?:\s?(?:\(at\)|\[at\])\s?|@)[\w-]+(?:\.[\w-]+)*\.[{_LETTERS}]{{2,}}\b", re.IGNORECASE
)
_PHONE_LABELS = ("tel", "phone", "fax", "mobile", "hotline", "helpline")
_LABELLED_PHONE = re.compile(
    r"""(?<![\w.,/-])(?:tel(?:ephone)?|phone|fax|mobile|hotline|helpline)\b\.?(?:\s+(?:number|no\.?))?[\s:]*
        \+?\(?\d[\d\s().–-]{5,18}\d(?![\w–-])""",
    re.VERBOSE | re.IGNORECASE,
)
_PHONE = re.compile(
    r"""(?<![\w.,/-])(?:
        \+\d{1,3}[\s–-]?\(?\d{1,4}\)?(?:[\s–‑-]\d{2,4}){2,4}
      | (?:1[\s.–-])?\(\d{3}\)[\s.–-]?\d{3}[\s.–‑-]\d{4}
      | 1[–-](?:8\d\d)[–-][\dA-Z]{1,4}(?:[–-]?[\dA-Z]{1,7})+
      | 0800\s\d{3}\s\d{3,4}
      | \d{3}[–‑-]\d{3}[–‑-]\d{4}
    )(?![\w.,–-]*\d)""",
    re.VERBOSE | re.IGNORECASE,
)
_MAYBE_PHONE = re.compile(r"\d\)?[\s.–‑-]?\d{3}[\s.–‑-]\d{4}|\+\d|1[–-]8\d\d[–-]|0800\s")
_RECORD_LABELS = ("mrn", "mr#", "record", "hospital n", "patient id", "patient n", "nhs n", "ssn", "social security")
_LABELLED_RECORD = re.compile(
    r"""\b(?:(?:MRN|MR\#|medical\s+record\s+(?:number|no\.?|\#)|NHS\s+(?:number|no\.?)|SSN
             |social\s+security\s+(?:number|no\.?))\s*[:\#=]?\s*(?:is\s+)?
          |(?:hospital\s+(?:number|no\.?)|patient\s+(?:id|number|no\.?)|(?:case\s+)?record\s+no\.?)
             (?:\s*[:\#=]\s*|\s+is\s+|\s+(?=\d{5,}\b(?![-–]))))
        [A-Z]{0,3}-?\d[\d\s-]{1,14}\d\b""",
    re.VERBOSE | re.IGNORECASE,
)
_SOCIAL_SECURITY = re.compile(r"(?<!\w)(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?!\w)")
_HEADER_NAME = re.compile(
    r"""^(?P<label>[ ]*(?:(?:patient(?:'s)?\s+name|name\s+of\s+patient|patient|full\s+name|surname|name)[ ]*:[ ]*
          |(?:referring|attending|treating)\s+(?:physician|doctor|consultant)[ ]*:[ ]*
          |(?:re|dear)[ ]*:?[ ]+(?=(?:mr|mrs|ms|miss|dr|prof)\.?[ ])))
        (?P<name>(?:mr|mrs|ms|miss|dr|prof)\.?[ ]+(?-i:[A-ZÀ-Þ])[\w'’-]+(?:,?[ ]+(?-i:[A-ZÀ-Þ])[\w'’.-]*){0,3}
          |(?-i:[A-ZÀ-Þ])[\w'’.-]*(?:,?[ ]+(?-i:[A-ZÀ-Þ])[\w'’.-]*){1,3})""",
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)


def redact(text: str, kinds: Collection[str] = KINDS) -> tuple[str, Counter[str]]:
    """The text with ``<email>``, ``<phone>``, ``<record_number>``, ``<name>`` for what was found, counted."""
    found: Counter[str] = Counter()
    lowered = text.lower()  # what is sought is rare: a plain search for its labels spares most texts the patterns
    if "email" in kinds and ("@" in text or "at)" in lowered or "at]" in lowered):
        text, found["email"] = _EMAIL.subn("<email>", text)
    if "record_number" in kinds:
        if any(label in lowered for label in _RECORD_LABELS):
            text, found["record_number"] = _LABELLED_RECORD.subn("<record_number>", text)
        text, count = _SOCIAL_SECURITY.subn("<record_number>", text)
        found["record_number"] += count
    if "phone" in kinds:
        if any(label in lowered for label in _PHONE_LABELS):
            text, found["phone"] = _LABELLED_PHONE.subn("<phone>", text)
        if _MAYBE_PHONE.search(text):
            text, count = _PHONE.subn("<phone>", text)
            found["phone"] += count
    if "name" in kinds:
        lines = text.split("\n", HEADER_LINES)
        header, found["name"] = _HEADER_NAME.subn(_without_name, "\n".join(lines[:HEADER_LINES]))
        text = "\n".join([header, *lines[HEADER_LINES:]])
    return text, +found


def _without_name(match: re.Match[str]) -> str:
    return f"{match['label']}<name>"

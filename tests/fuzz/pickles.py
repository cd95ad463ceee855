"""Changes of a pickle: opcodes put between its own, and bytes changed."""

from __future__ import annotations

import pickletools

from tests.fuzz.mutations import change_bytes

SNIPPETS = [  # put between two opcodes of a pickle that is in order
    b"cos\nsystem\nX\x02\x00\x00\x00id\x85R0",
    b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x05\x00\x85R0",
    b"ctorch\nFloatStorage\n0",
    b")" + b"2\x86" * 70 + b"0",
    b"})" + b"2\x86" * 60 + b"Ns0",
    b"}(" + b")" + b"2\x86" * 40 + b"Nu0",
    b"Nr\xff\xff\xff\x7f0",
    b"Np99999999999\n0",
    b"I" + b"9" * 5000 + b"\n0",
    b"\x8b\xff\xff\xff\x7f0",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f0",
    b"X\xff\xff\xff\xff0",
    b"]2a0",
    b"}2Ns0",
    b"(" * 100_000,
    b"N" * 100_000,
    b"c_codecs\nencode\nX\x06\x00\x00\x00aaaaaaX\x08\x00\x00\x00punycode\x86R0",
    b"ctorch._utils\n_rebuild_tensor_v2\n)R0",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R0",
    b"ctorch\nSize\n(K\x01K\x02tR0",
    b"cargparse\nNamespace\n)\x81}b0",
    b"\x80\x05",
    b"\x82\x01",
    b"Pabc\n0",
    b"K\x01Q0",
    b"0",
    b"1",
    b"a",
    b".",
]


def changed_pickle(raw: bytes, case: dict) -> bytes:
    for where, snippet in case["snippets"]:
        try:
            places = [at for _, _, at in pickletools.genops(raw)]
        except ValueError:
            break
        at = places[int(where * len(places))] or 0
        raw = raw[:at] + snippet + raw[at:]
    return change_bytes(raw, case["pickle"])

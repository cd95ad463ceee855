"""What the driver reports of a node's GPUs: each fault is found, with the GPU, the kind and what to do."""

from pathlib import Path

import pytest

from livt_scale.doctor import nvidia_smi
from livt_scale.doctor.nvidia_smi import judge, look, read_gpus, read_links, read_xids

GPU = Path(__file__).with_name("nvidia_smi_gpu.xml").read_text()  # the parts of a real GPU's that are read, and others
HEAD = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
\t<driver_version>580.159.04</driver_version>
\t<attached_gpus>4</attached_gpus>
"""
LINKS = "".join(f"\t Link {k}: 26.562 GB/s\n" for k in range(18))
UUIDS = [f"7a5d0c3e-0000-4000-8000-00000000000{k}" for k in range(4)]


def node_of_four(old="", new=""):
    """`nvidia-smi -q -x`; of gpu 2, `old` is replaced."""
    assert old in GPU
    gpus = [GPU.replace("{index}", str(k)) for k in range(4)]
    gpus[2] = gpus[2].replace(old, new)
    return f"{HEAD}{''.join(gpus)}</nvidia_smi_log>\n"


def links_of_four(old="", new=""):
    """`nvidia-smi nvlink --status`; of gpu 2, `old` is replaced once."""
    return "".join(
        f"GPU {k}: NVIDIA H100 80GB HBM3 (UUID: GPU-{UUIDS[k]})\n{LINKS.replace(old, new, 1) if k == 2 else LINKS}"
        for k in range(4)
    )


def findings(xml="", *, links="", dmesg="", seconds=None, now_s=1000.0):
    gpus = read_gpus(xml or node_of_four())
    return judge(gpus, read_links(links or links_of_four()), read_xids(dmesg, now_s=now_s), seconds or {})


def test_a_node_without_faults_has_no_findings():
    usual = "[    9.1] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.159.04\n"
    assert findings(dmesg=usual, seconds=dict.fromkeys(UUIDS, 0.0015)) == []


@pytest.mark.parametrize(
    ("tag", "old", "new", "status"),
    [
        ("dram_uncorrectable", "0", "1", "problem"),
        ("sram_uncorrectable_parity", "0", "2", "problem"),
        ("sram_threshold_exceeded", "No", "Yes", "problem"),
        ("remapped_row_pending", "No", "Yes", "problem"),
        ("remapped_row_failure", "No", "Yes", "problem"),
        ("remapped_row_unc", "0", "4", "note"),
        ("gpu_recovery_action", "None", "Drain and Reset", "problem"),
        ("clocks_event_reason_hw_slowdown", "Not Active", "Active", "problem"),
        ("clocks_event_reason_hw_thermal_slowdown", "Not Active", "Active", "problem"),
        ("clocks_event_reason_hw_power_brake_slowdown", "Not Active", "Active", "problem"),
        ("persistence_mode", "Enabled", "Disabled", "note"),
    ],
)
def test_a_changed_value_is_found(tag, old, new, status):
    (finding,) = findings(node_of_four(f"<{tag}>{old}</{tag}>", f"<{tag}>{new}</{tag}>"))
    assert (finding.name, finding.status) == ("gpu 2", status)
    assert finding.message
    assert finding.fix


def test_limited_clocks_are_noted():
    old = "<applications_clocks>\n\t\t\t<graphics_clock>1980"
    (finding,) = findings(node_of_four(old, old.replace("1980", "1410")))
    assert (finding.name, finding.status) == ("gpu 2", "note")
    assert "1410 of 1980 MHz" in finding.message


def test_what_a_driver_does_not_report_is_not_judged_and_old_names_are_read():
    for value in ("0", "No", "None", "Not Active", "Enabled", "1980 MHz"):
        assert findings(node_of_four(f">{value}<", ">N/A<")) == []
    older = node_of_four("clocks_event_reason", "clocks_throttle_reason")
    assert findings(older) == []
    tag = "clocks_throttle_reason_hw_slowdown"
    (finding,) = findings(older.replace(f"<{tag}>Not Active", f"<{tag}>Active"))
    assert (finding.name, finding.status) == ("gpu 2", "problem")


@pytest.mark.parametrize("speed", ["<inactive>", "0 GB/s"])
def test_a_link_that_is_down_is_found(speed):
    (finding,) = findings(links=links_of_four("Link 7: 26.562 GB/s", f"Link 7: {speed}"))
    assert (finding.name, finding.status) == ("gpu 2", "problem")
    assert "17" in finding.message
    assert "18" in finding.message


def test_links_that_no_gpu_has_are_no_fault():
    assert findings(links=links_of_four().replace("26.562 GB/s", "<inactive>")) == []
    assert findings(links="NVML: Unable to retrieve NvLink information as all links are inActive\n") == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("[  900.000001] NVRM: Xid (PCI:0000:12:00): 79, pid='<unknown>', GPU has fallen off the bus.", "gpu 2"),
        ("[  900.000001] NVRM: Xid (PCI:0000:ab:00): 79, GPU has fallen off the bus.", "gpu at 0000:ab:00"),
        ("NVRM: Xid (PCI:0000:12:00): 48, pid=4711, name=python3, DBE", "gpu 2"),  # a dmesg without times
        ("[  900.000001] NVRM: Xid (PCI:0000:12:00): 31, pid=4711, name=python3, MMU Fault", None),  # the program's
        ("[Mon Nov 30 03:00:00 2026] NVRM: Xid (PCI:0000:12:00): 74, pid=4711, NVLink: fatal error", "gpu 2"),
    ],
)
def test_an_xid_of_a_fault_is_found(line, name):
    found = findings(dmesg=f"{line}\n{line}\n")
    assert [(f.name, f.status) for f in found] == ([(name, "problem")] if name else [])


def test_an_xid_of_last_week_is_not():
    line = "[  900.000001] NVRM: Xid (PCI:0000:12:00): 79, GPU has fallen off the bus."
    assert findings(dmesg=line, now_s=900 + 7 * 86_400) == []


def test_a_slow_gpu_is_found():
    (finding,) = findings(seconds=dict(zip(UUIDS, (0.0015, 0.0015, 0.0021, 0.00152), strict=True)))
    assert (finding.name, finding.status) == ("gpu 2", "problem")
    assert "72%" in finding.message


def test_the_gpus_of_other_jobs_are_not_judged():
    tag = "remapped_row_failure"
    xml = node_of_four(f"<{tag}>No", f"<{tag}>Yes")
    links = links_of_four("Link 7: 26.562 GB/s", "Link 7: <inactive>")
    dmesg = "[  900.000001] NVRM: Xid (PCI:0000:12:00): 79, GPU has fallen off the bus."
    assert findings(xml, links=links, dmesg=dmesg, seconds=dict.fromkeys(UUIDS[:2], 0.0015)) == []
    assert len(findings(xml, links=links, dmesg=dmesg, seconds=dict.fromkeys(UUIDS[1:3], 0.0015))) == 3


def test_without_nvidia_smi_there_is_one_note(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = look({})
    assert finding.status == "note"


def test_an_nvidia_smi_that_fails_is_a_problem_and_one_that_answers_is_read(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nvidia_smi, "TIMEOUT_S", 5.0)
    program.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU0: Unknown Error'\nexit 15\n")
    program.chmod(0o755)
    (finding,) = look({})
    assert (finding.name, finding.status) == ("nvidia-smi", "problem")

    (tmp_path / "xml").write_text(node_of_four("<remapped_row_pending>No", "<remapped_row_pending>Yes"))
    (tmp_path / "links").write_text(links_of_four())
    program.write_text(f'#!/bin/sh\ncase "$1" in -q) cat "{tmp_path}/xml" ;; *) cat "{tmp_path}/links" ;; esac\n')
    found = [f for f in look({}) if "Xid" not in f.message]
    assert [(f.name, f.status) for f in found] == [("gpu 2", "problem")]

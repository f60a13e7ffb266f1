# SPDX-License-Identifier: Apache-2.0
"""``vllm-mtp doctor``."""

from dataclasses import dataclass


@dataclass
class Doctor:
    """Check whether the method can work with the vLLM that is installed here: its
    version and runner, every symbol that the plugin needs, and what is wrong with
    the fix. Exit code 1 when the method cannot work."""

    def run(self) -> int:
        from vllm_mtp.serving.doctor import examine

        findings = examine()
        width = max(len(finding.topic) for finding in findings)
        for finding in findings:
            print(f"{finding.mark} {finding.topic:<{width}}  {finding.text}")
        failed = sum(finding.failed for finding in findings)
        print(f"\n{failed} problem(s)" if failed else "\nthe method can work here")
        return 1 if failed else 0

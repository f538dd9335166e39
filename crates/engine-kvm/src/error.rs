//! What the host's refusals mean, in words.

use ringfort_engine::EngineError;
use std::path::Path;

const ENGINE: &str = "kvm";

pub(crate) fn unavailable(reason: impl Into<String>) -> EngineError {
    EngineError::Unavailable { engine: ENGINE, reason: reason.into() }
}

/// An ioctl that failed.
pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    move |e| EngineError::Host { what: format!("KVM: {}", what.into()), source: io_error(e) }
}

pub(crate) fn io_error(e: kvm_ioctls::Error) -> std::io::Error {
    std::io::Error::from_raw_os_error(e.errno())
}

/// Why the device could not be opened: `errno` of open(2).
pub fn open_failed(device: &Path, errno: i32) -> EngineError {
    let path = device.display();
    unavailable(match errno {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => format!(
            "there is no {path}; switch virtualization on in the firmware and load kvm_intel or kvm_amd, or give --accel soft"
        ),
        libc::EACCES | libc::EPERM => {
            format!(
                "{path} may not be used by this user; join the group that owns it (often kvm), or give --accel soft"
            )
        }
        e => format!("{path}: {}; give --accel soft", std::io::Error::from_raw_os_error(e)),
    })
}

/// Why no VM could be made: `errno` of KVM_CREATE_VM.
pub fn vm_failed(errno: i32) -> EngineError {
    unavailable(match errno {
        libc::EBUSY => {
            "the CPU's virtualization is in use by another hypervisor; end that one (VirtualBox, VMware, …), or give --accel soft"
                .into()
        }
        libc::ENOTTY | libc::EINVAL => "the device is no KVM; check it, or give --accel soft".into(),
        libc::ENOMEM => "the host has no memory for another VM; end something or give --accel soft".into(),
        libc::EMFILE | libc::ENFILE => "no file descriptors are left; raise the limit (ulimit -n)".into(),
        libc::EOPNOTSUPP | libc::EIO => {
            "virtualization is switched off in the firmware; switch it on there, or give --accel soft".into()
        }
        e => format!("no VM can be made: {}; give --accel soft", std::io::Error::from_raw_os_error(e)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_says_what_to_do() {
        let device = Path::new("/dev/kvm");
        for (e, says) in [
            (open_failed(device, libc::ENOENT), "no /dev/kvm; switch virtualization on"),
            (open_failed(device, libc::EACCES), "group"),
            (open_failed(device, libc::EMFILE), "--accel soft"),
            (vm_failed(libc::EBUSY), "another hypervisor"),
            (vm_failed(libc::ENOTTY), "no KVM"),
            (vm_failed(libc::ENOMEM), "memory"),
        ] {
            let e = e.to_string();
            assert!(e.contains(says) && !e.contains('\n'), "{e}");
        }
    }
}

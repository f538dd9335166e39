//! Short guests on the host's own KVM.

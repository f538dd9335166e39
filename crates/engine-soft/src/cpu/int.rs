//! The four operand widths.

/// An operand width: `u8`, `u16`, `u32` or `u64`.
pub trait Int: Copy + Eq + Default + std::fmt::Debug + Send + Sync + 'static {
    /// Bytes.
    const SIZE: usize;
    /// Bits.
    const BITS: u32 = Self::SIZE as u32 * 8;
    /// The low bits of `v`.
    fn from_u64(v: u64) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
    /// Sign-extended.
    fn to_i64(self) -> i64;
}

macro_rules! int {
    ($u:ty, $i:ty, $n:expr) => {
        impl Int for $u {
            const SIZE: usize = $n;
            #[inline(always)]
            fn from_u64(v: u64) -> Self {
                v as $u
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                self as $i as i64
            }
        }
    };
}
int!(u8, i8, 1);
int!(u16, i16, 2);
int!(u32, i32, 4);
int!(u64, i64, 8);

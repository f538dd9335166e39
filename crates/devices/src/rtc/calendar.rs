//! Days and dates: the proleptic Gregorian calendar.

use serde::{Deserialize, Serialize};

/// A date and time of day as the clock chip counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DateTime {
    pub(super) year: u16,
    pub(super) month: u8,
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

/// Days from 1970-01-01 to a date; months and days beyond their range carry on.
fn days(year: i64, month: i64, day: i64) -> i64 {
    // Years that begin in March put the leap day last.
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let in_era = y.rem_euclid(400);
    let in_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + in_era * 365 + in_era / 4 - in_era / 100 + in_year - 719_468
}

impl DateTime {
    pub(super) fn from_unix(seconds: i64) -> DateTime {
        let (day_no, s) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let z = day_no + 719_468;
        let (era, in_era) = (z.div_euclid(146_097), z.rem_euclid(146_097));
        let year = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
        let in_year = in_era - (365 * year + year / 4 - year / 100);
        let m = (5 * in_year + 2) / 153;
        let month = if m < 10 { m + 3 } else { m - 9 };
        let y = era * 400 + year + i64::from(month <= 2);
        DateTime {
            year: y.clamp(0, 9999) as u16,
            month: month as u8,
            day: (in_year - (153 * m + 2) / 5 + 1) as u8,
            hour: (s / 3600) as u8,
            minute: (s / 60 % 60) as u8,
            second: (s % 60) as u8,
        }
    }

    pub(super) fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let d = days(i64::from(self.year), month, i64::from(self.day.max(1)));
        d * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// Day of the week, 1 for Sunday to 7.
    pub(super) fn weekday(self) -> u8 {
        // 1970-01-01 was a Thursday, day 5.
        ((self.to_unix().div_euclid(86_400) + 4).rem_euclid(7) + 1) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_go_both_ways() {
        let at = |s| {
            let d = DateTime::from_unix(s);
            (d.year, d.month, d.day, d.hour, d.minute, d.second, d.weekday())
        };
        assert_eq!(at(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(at(951_782_399), (2000, 2, 28, 23, 59, 59, 2));
        assert_eq!(at(951_868_799), (2000, 2, 29, 23, 59, 59, 3));
        assert_eq!(at(4_102_444_800), (2100, 1, 1, 0, 0, 0, 6));
        let mut rng = fastrand::Rng::with_seed(5);
        for _ in 0..20_000 {
            let s = rng.i64(-60_000_000_000..250_000_000_000);
            assert_eq!(DateTime::from_unix(s).to_unix(), s);
        }
    }
}

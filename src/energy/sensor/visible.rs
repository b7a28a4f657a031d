//! Which card a computing library's ordinal means.
//!
//! Owns the reading of CUDA_VISIBLE_DEVICES: with it, ordinal 0 may be any card of the machine, and a counter of card 0 would measure
//! somebody else's work. Takes the ordinal and the variable's text, returns the driver's index or the start of a UUID.

/// A card, as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// By number.
    Index(u32),
    /// By the UUID, or the start of it.
    Uuid(String),
}

/// What `ordinal` means where the variable holds `list`; else why it means nothing that can be measured.
pub(super) fn wanted(ordinal: u32, list: Option<&str>) -> Result<Wanted, String> {
    let Some(list) = list else {
        return Ok(Wanted::Index(ordinal));
    };
    // The list ends at the first entry that is none.
    let entries = list
        .split(',')
        .map(str::trim)
        .map_while(|entry| match entry.parse() {
            Ok(index) => Some(Wanted::Index(index)),
            Err(_) if entry.starts_with("GPU-") || entry.starts_with("MIG-") => {
                Some(Wanted::Uuid(entry.to_string()))
            }
            Err(_) => None,
        });
    match entries.into_iter().nth(ordinal as usize) {
        Some(Wanted::Uuid(uuid)) if uuid.starts_with("MIG-") => Err(format!(
            "`{uuid}` is a slice of a card, which has no counter of its own"
        )),
        Some(wanted) => Ok(wanted),
        None => Err(format!(
            "CUDA_VISIBLE_DEVICES is `{list}`: it has no entry {ordinal}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinal_is_a_place_in_the_list() {
        // CUDA C++ Programming Guide, environment variables: the order of the list is the order of the ordinals.
        assert_eq!(wanted(1, None), Ok(Wanted::Index(1)));
        assert_eq!(wanted(0, Some("2,0")), Ok(Wanted::Index(2)));
        assert_eq!(wanted(1, Some("2, 0")), Ok(Wanted::Index(0)));
        assert_eq!(
            wanted(0, Some("GPU-8932f937")),
            Ok(Wanted::Uuid("GPU-8932f937".to_string()))
        );
        assert!(wanted(0, Some("MIG-1f00")).unwrap_err().contains("slice"));
        // "0,-1,1": only card 0 is visible.
        assert!(
            wanted(1, Some("0,-1,1"))
                .unwrap_err()
                .contains("no entry 1")
        );
        assert!(wanted(0, Some("")).is_err());
    }
}
